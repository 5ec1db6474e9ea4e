"""What a notebook wants, as fastai users expect it: `from kdfast.all import *`."""

import fastai.vision.all  # noqa: F401  fastai's methods and pictures, as its own notebooks have them

from kdfast.data import ImageData, dataloaders
from kdfast.datasets import load_data
from kdfast.distill import Distill
from kdfast.errors import KdfastError
from kdfast.evaluation import beside_teacher, metrics, predict
from kdfast.experiment import Experiment
from kdfast.knowledge import Stored
from kdfast.methods import (
    AT,
    CAT,
    CC,
    DIST,
    DKD,
    KD,
    NKD,
    NST,
    OFD,
    PKT,
    RKD,
    SP,
    WSLD,
    FitNet,
    Hard,
    Method,
    Standardized,
    Sum,
    create_method,
    method_names,
    ramp,
    register,
)
from kdfast.models import architecture, count_parameters, create_model, model_names, register_model
from kdfast.results import Record, read_record, read_records, tidy
from kdfast.run import Run
from kdfast.study import Study, load_study
from kdfast.taps import Outputs
from kdfast.teacher import Teacher, load_teacher
from kdfast.training import Views, create_learner, fit, history, set_seed

__all__ = [
    "AT", "CAT", "CC", "DIST", "DKD", "KD", "NKD", "NST", "OFD", "PKT", "RKD", "SP", "WSLD", "Distill", "Experiment", "FitNet",
    "Hard", "ImageData", "KdfastError", "Method", "Outputs", "Record", "Run", "Standardized", "Stored", "Study", "Sum", "Teacher",
    "Views",
    "architecture", "beside_teacher", "count_parameters", "create_learner", "create_method", "create_model", "dataloaders", "fit",
    "history", "load_data", "load_study", "load_teacher", "method_names", "metrics", "model_names", "predict", "ramp",
    "read_record", "read_records", "register", "register_model", "set_seed", "tidy",
]  # fmt: skip
