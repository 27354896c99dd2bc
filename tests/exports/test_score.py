"""Metrics in user code, from what artifacts give."""

from __future__ import annotations

import asyncio

from tests.support.worker_stages import OpenStages
from torchworker.contract import RESULT, Reply, ScoreRequest, ScoreResult, TrainResult, decode
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.tasks.requests import fixed_gates
from train_and_ship.tasks.worker import call_worker

TAGGER = """
    class Tagger(nn.Module):
        '''tokens [batch, 6] → scores [batch, length of the longest, 3]: how long that is depends on the batch.'''
        def __init__(self):
            super().__init__()
            self.embed, self.classify = nn.Embedding(9, 8), nn.Linear(8, 3)
        def forward(self, tokens):
            longest = int(tokens.ne(0).sum(1).max())
            return self.classify(self.embed(tokens[:, :longest]))
    def build_model():
        return Tagger()
    def build_dataset(split):
        random = torch.Generator().manual_seed(0 if split == "train" else 1)
        tokens = torch.randint(1, 9, (96, 6), generator=random)
        # The longest last, so that batches differ.
        lengths = 1 + torch.arange(96) * 6 // 96
        tokens[torch.arange(6) >= lengths[:, None]] = 0
        return TensorDataset(tokens, torch.where(tokens == 0, -100, tokens % 3))
    def loss(scores, tags):
        return nn.functional.cross_entropy(scores.flatten(0, 1), tags[:, : scores.shape[1]].flatten())
    def share_right(scores, tags):
        assert len(scores) == len(tags)
        if len(scores) == 96:
            # Of every sample beyond the longest of its batch.
            assert scores.isnan().any() and not scores[tags != -100].isnan().any()
        return (scores.argmax(2) == tags)[tags != -100].float().mean()
"""


def test_a_metric_sees_decoded_lengths_that_differ_from_batch_to_batch(
    stages: OpenStages, fork_server: ForkServer
) -> None:
    metric = {"factory": "plain:share_right", "better": "higher"}
    opened = stages(
        TAGGER,
        train={
            "epochs": 6,
            "processes": 2,
            "batch_size": 16,
            "learning_rate": 0.05,
            "loss": {"factory": "plain:loss"},
            "metrics": [metric],
        },
        export={"batch": 8},
        gates={"share_right": {"min": 0.9}},
    )
    trained: TrainResult = decode(TrainResult, Reply.read(opened.folder / "train" / RESULT).result)
    opened.export("torchscript")
    proven = opened.validate()
    assert proven.passed, [item for item in proven.verdicts if not item.passed]
    assert opened.result is not None
    folder = opened.folder / "score"
    folder.mkdir()
    request = ScoreRequest(
        project=opened.project,
        folder=str(opened.folder / "export"),
        formats={kind: artifact.file for kind, artifact in opened.result.artifacts.items()},
        inputs=opened.result.inputs,
        batch=8,
        gates=fixed_gates(opened.job, custom=True),
        threads=1,
    )
    scored: ScoreResult = decode(ScoreResult, asyncio.run(call_worker(fork_server, "score", request, folder)))
    (verdict,) = scored.verdicts
    assert verdict.passed, verdict
    # The trained model was measured by two ranks, in other batches.
    assert scored.metrics["torchscript"]["share_right"] == trained.history[-1]["validation_share_right"]
