"""How hyper-parameters were chosen: a tuning study's validation results as tables and sentences. TeX source."""

import pandas as pd

from kdfast.report.figures import short
from kdfast.report.latex import tex
from kdfast.study.study_file import Study


def sweep_table(study: Study, baselines: pd.DataFrame) -> pd.DataFrame:
    """Mean validation NLL of every model at every value of the swept parameter, the lowest in bold."""
    (swept,) = study.sweep
    table = baselines.pivot_table(index="student", columns=swept, values="valid_nll")
    rows = []
    for model, values in table.iterrows():
        cells = {f"{v:g}": f"{nll:.4f}" for v, nll in values.items()}
        best = f"{values.idxmin():g}"
        rows.append({"network": tex(short(model))} | cells | {best: f"\\textbf{{{cells[best]}}}"})
    return pd.DataFrame(rows)


def best_swept(study: Study, baselines: pd.DataFrame) -> dict[str, float]:
    """The value of the swept parameter with the lowest mean validation NLL, by model."""
    (swept,) = study.sweep
    return baselines.pivot_table(index="student", columns=swept, values="valid_nll").idxmin(axis=1).to_dict()


def method_means(distilled: pd.DataFrame) -> pd.DataFrame:
    """Mean validation accuracy and NLL of every method and its arguments over all pairs and seeds, best first."""
    means = distilled.groupby(["method", "method_args"])[["valid_top1", "valid_nll"]].mean().reset_index()
    return means.sort_values(["valid_top1", "valid_nll"], ascending=[False, True], ignore_index=True)


def method_table(distilled: pd.DataFrame) -> pd.DataFrame:
    """`method_means` as it is printed."""
    means = method_means(distilled)
    return pd.DataFrame({
        "method": means.method.map(tex),
        "arguments": means.method_args.map(tex),
        "validation accuracy (\\%)": means.valid_top1.map(lambda v: f"{100 * v:.2f}"),
        "validation NLL": means.valid_nll.map("{:.4f}".format),
    })  # fmt: skip


def tuning_sentence(study: Study, distilled: pd.DataFrame) -> str:
    """What was chosen, and by what."""
    swept = ", ".join(tex(name) for name in study.sweep)
    said = f"For every network the value of {swept} with the lowest mean validation NLL was taken"
    if distilled.empty:
        return said + "."
    best = method_means(distilled).iloc[0]
    return (
        f"{said}; for method {tex(best.method)}, trained at those values, the arguments with the highest mean validation "
        f"accuracy over all pairs: {tex(best.method_args)}."
    )
