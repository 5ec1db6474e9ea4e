"""What a study cost, as tables and sentences. TeX source."""

import pandas as pd

from kdfast.plots import short
from kdfast.report import tex


def cost_table(distilled: pd.DataFrame, plain: pd.DataFrame) -> pd.DataFrame:
    """Sizes and training times of every pair; times are medians over seeds, in seconds, the teacher's part a share of all."""
    alone = plain.groupby("student").training_s.median()
    rows = [
        {
            "student": tex(short(student)),
            "teacher": tex(short(teacher)),
            "times smaller": f"{cell.teacher_parameters.iloc[0] / cell.parameters.iloc[0]:.1f}",
            "alone (s)": f"{alone[student]:.1f}",
            "distilled (s)": f"{cell.training_s.median():.1f}",
            "ratio": f"{cell.training_s.median() / alone[student]:.2f}",
            "teacher's part (\\%)": f"{100 * cell.teacher_s.sum() / cell.training_s.sum():.1f}",
        }
        for (student, teacher), cell in distilled.groupby(["student", "teacher"])
    ]
    return pd.DataFrame(rows)


def cost_sentence(distilled: pd.DataFrame, plain: pd.DataFrame) -> str:
    """The range of the training-time ratios, the teacher's part, and what training the teachers cost beside it."""
    if distilled.empty:
        return "This study distils nothing, so there is no cost to compare."
    alone = plain.groupby("student").training_s.median()
    ratio = distilled.groupby(["student", "teacher"]).training_s.median() / alone
    teachers = plain[plain.student.isin(distilled.teacher)].groupby("student").training_s.median()
    live = (distilled.knowledge == "live").sum()
    source = "a live teacher" if live == len(distilled) else "stored answers of the teacher"
    mixed = f" (a live teacher in {live} of {len(distilled)} runs)" if 0 < live < len(distilled) else ""
    return (
        f"Training with {source}{mixed} took {ratio.min():.2f} to {ratio.max():.2f} times as long as training the student "
        f"alone (median over seeds), {ratio.median():.2f} times in the median pair. Asking the teachers was "
        f"{100 * distilled.teacher_s.sum() / distilled.training_s.sum():.1f}\\,\\% of the distilled runs' training time. "
        "The teacher has to be trained first, "
        f"which took {teachers.min():.1f} to {teachers.max():.1f} seconds against {alone[distilled.student.unique()].min():.1f} "
        f"to {alone[distilled.student.unique()].max():.1f} for a student alone. Several runs shared the machine, so that "
        "seconds are indicative and only ratios are compared. Inference is unchanged by distillation: what a student saves "
        "is its size against the teacher's."
    )
