"""What the columns of the first output are called, as the job says: there have to be as many as the model has."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Subset

from torchworker.contract import Project, in_other_order, label_counts
from torchworker.process.failure import UserError


def require_labels(project: Project, output: str, shape: Sequence[int | str]) -> None:
    """Raises UserError for labels that are more or fewer than the columns.

    Args:
        project: names the labels; nothing is asked where it has none.
        output: name of the model's first output.
        shape: of it, `[batch, …]`, where a string is a dynamic dimension's name.
    """
    if not project.labels:
        return
    given, counts = len(project.labels), label_counts(shape)
    shown = f"output {output!r} of forward, [{', '.join(map(str, ['batch', *shape[1:]]))}]"
    if not counts:
        raise UserError(f"export.labels: expected an output with a fixed number of columns, got {shown}")
    if given not in counts:
        raise UserError(
            f"export.labels: expected {' or '.join(map(str, counts))} texts, one for each column of {shown}, got "
            f"{given} ({', '.join(project.labels[:5])}{', …' if given > 5 else ''})"
        )


def class_names(dataset: object) -> list[str]:
    """What a dataset calls its classes, as torchvision's do: `classes`, a list of names; empty where it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else []


def other_order(project: Project, dataset: object) -> list[str]:
    """A note where the job's labels are the classes of the training data in another order; none otherwise."""
    other = in_other_order(project.labels, class_names(dataset), project.data.target)
    return [other] if other else []
