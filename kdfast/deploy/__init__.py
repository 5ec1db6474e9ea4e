"""The student for those who only use it: ONNX, int8, model card, and what it costs to run. Trains nothing."""
