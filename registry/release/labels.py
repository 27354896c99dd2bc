"""What the columns of a model's first output are called: as the job says, or as its training data does."""

from __future__ import annotations

from collections.abc import Sequence

from shipreader.records import label_counts, wrong_labels
from torchworker.contract import TensorSpec, in_other_order


def labels_of(said: Sequence[str], classes: Sequence[str], output: TensorSpec, data: str) -> tuple[list[str], str]:
    """The labels of a release, empty for none, and in words why what the data has is none, or another order of them.

    Args:
        said: `export.labels` of the job, which is taken as it is.
        classes: what the training data has as `classes`.
        output: the first one of the model.
        data: `data.factory` of the job, for the words.
    """
    if other := in_other_order(said, classes, data):
        return list(said), other
    if said or not classes:
        return list(said), ""
    not_taken = f"the release has no labels: {data} has `classes`, and"
    if wrong := wrong_labels(classes):
        return [], f"{not_taken} labels are {wrong}; name them in export.labels"
    counts = label_counts(output.shape)
    if len(classes) not in counts:
        columns = " or ".join(map(str, counts)) or "no fixed number of"
        return [], f"{not_taken} there are {len(classes)} for {columns} columns of {output.name}"
    return list(classes), ""
