"""Networks by name, each with its family, their weights to begin with, and what they cost to compute.

How they are trained is `kdfast.training`; what they take in an app is `kdfast.deploy`.
"""
