"""Asking the model itself a probe's question, and what a model that can be asked must not do."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial

from torchworker.parity.probes import ZERO, Inputs, Probe
from torchworker.process.failure import UserError
from torchworker.process.fork import ChildDiedError, ChildTimeoutError, CrashNote, run_in_fork
from torchworker.project.answers import Answers, roundoff_of, same_values

NOISY_SECONDS = 30.0
"""Of a model that takes longer among noise, eager's own rounding is the measure."""


def complete(answers: Answers, probe: Probe) -> Probe:
    """The probe with the model's answers. Raises UserError when the model refuses it."""
    eager = answers.eager({name: tensor.clone() for name, tensor in probe.inputs.items()})
    exact = answers.exact(probe.inputs)
    perturbed = {} if exact else answers.perturbed(probe.inputs)
    whole = any(not tensor.is_floating_point() for tensor in eager.values())
    tied = answers.tied(probe.inputs) if whole else {}
    roundoff = roundoff_of(answers.model)
    return replace(probe, eager=eager, exact=exact, perturbed=perturbed, tied=tied, roundoff=roundoff)


def complete_among_noise(answers: Answers, probe: Probe) -> Probe:
    """As `complete`; of samples of zeros also how far rounding moves the model: eager is no measure of it there."""
    asked = complete(answers, probe)
    if probe.name != ZERO or not asked.exact:
        return asked
    # In a fork: what a model compiles when called, as torch.cond does, fails among noise, and ever after.
    with suppress(ChildDiedError, ChildTimeoutError):
        noisy = run_in_fork(partial(answers.noisy, probe.inputs), CrashNote(), NOISY_SECONDS)
        return replace(asked, perturbed=noisy)
    return asked


def require_repeatable(answers: Answers, probe: Probe) -> None:
    """Raises UserError unless a second call gives the same and leaves the inputs alone. probe: answered."""
    name, given = _other_answer(answers, probe)
    if name:
        raise UserError(
            f"export: output {name!r} differs between two calls on the same inputs in eval mode; a model with "
            "randomness or state in forward cannot be proven equal to its export"
        )
    for name, tensor in probe.inputs.items():
        if not same_values(tensor, given[name]):
            raise UserError(
                f"export: forward changes its input {name!r} in place, which exported formats do not do; clone it first"
            )


def require_no_memory(answers: Answers, first: Probe) -> None:
    """Raises UserError when the model's answer to a question is another one after all the others.

    first: a batch of capture, with the answer of then.
    """
    name, _ = _other_answer(answers, first)
    if name:
        raise UserError(
            f"{answers.project.model.where}: output {name!r} of forward is another one after other inputs were "
            "asked: the model remembers them, in a buffer that is not saved or in an attribute; an exported model "
            "must not keep state between calls: take it as an input and return it as an output"
        )


def _other_answer(answers: Answers, probe: Probe) -> tuple[str, Inputs]:
    """The output that is another one when the probe is asked again, empty for none, and the inputs after that."""
    assert probe.eager is not None, "a batch of capture is answered"
    given = {name: tensor.clone() for name, tensor in probe.inputs.items()}
    again = answers.eager(given)
    return next((name for name, tensor in probe.eager.items() if not same_values(tensor, again.get(name))), ""), given
