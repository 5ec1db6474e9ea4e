"""Distillation itself: the fastai callback, losses, methods, the teacher, features, projectors, cached teacher outputs.

Works in any fastai Learner; nothing here knows of runs, studies or records on disk (`kdfast.experiment` does).
"""
