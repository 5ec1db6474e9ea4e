"""What a notebook wants, as fastai users expect it: `from kdfast.all import *`."""

import fastai.vision.all  # noqa: F401  fastai's methods and pictures, as its own notebooks have them

from kdfast.core.config import Run
from kdfast.core.errors import KdfastError
from kdfast.core.records import Record, read_record, read_records, tidy
from kdfast.data.datasets import load_data
from kdfast.data.loaders import ImageData, dataloaders
from kdfast.distill.callback import Distill
from kdfast.distill.features import Outputs
from kdfast.distill.method import Method, Sum, create_method, method_names, register
from kdfast.distill.methods import AT, CAT, CC, DIST, DKD, KD, NKD, NST, OFD, PKT, RKD, SP, WSLD, FitNet, HardLabel, Standardized
from kdfast.distill.schedules import ramp
from kdfast.distill.teacher import Teacher
from kdfast.distill.teacher_outputs import Cached
from kdfast.experiment.runner import Experiment
from kdfast.experiment.teachers import load_teacher
from kdfast.models.registry import architecture, count_parameters, create_model, model_names, register_model
from kdfast.study.study_file import Study, load_study
from kdfast.training.learner import Views, create_learner, fit, history, set_seed
from kdfast.training.metrics import beside_teacher, metrics, predict

__all__ = [
    "AT",
    "CAT",
    "CC",
    "DIST",
    "DKD",
    "KD",
    "NKD",
    "NST",
    "OFD",
    "PKT",
    "RKD",
    "SP",
    "WSLD",
    "Cached",
    "Distill",
    "Experiment",
    "FitNet",
    "HardLabel",
    "ImageData",
    "KdfastError",
    "Method",
    "Outputs",
    "Record",
    "Run",
    "Standardized",
    "Study",
    "Sum",
    "Teacher",
    "Views",
    "architecture",
    "beside_teacher",
    "count_parameters",
    "create_learner",
    "create_method",
    "create_model",
    "dataloaders",
    "fit",
    "history",
    "load_data",
    "load_study",
    "load_teacher",
    "method_names",
    "metrics",
    "model_names",
    "predict",
    "ramp",
    "read_record",
    "read_records",
    "register",
    "register_model",
    "set_seed",
    "tidy",
]  # fmt: skip
