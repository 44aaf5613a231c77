"""One case of a run: a network of a seed, how it is compiled, and what is found of it.

Most cases are graphs: the network is written as the graph that a trace would leave, in a tenth of
the time of tracing. The others go the whole way of a user: a module, traced, lowered
to a target, called, saved state and all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from refold.fuzz.agreement import Unclear
from refold.fuzz.contract import Breach
from refold.fuzz.generate import network_of
from refold.fuzz.graphs import judge_graph
from refold.fuzz.modules import judge_module
from refold.fuzz.network import DrawnNetwork
from refold.fuzz.outcome import ALARM, CRASH, REFUSED, UNJUDGED, WRONG, Alarm, Outcome, Setting
from refold.fuzz.program import Unsuited
from refold.rewrite.result import Decline, watch_failures

# How often each target is taken, where a run has several: Inductor takes seconds a module.
_SHARES = {"torch": 20, "ort": 8, "inductor": 1}


@dataclass(frozen=True)
class Mix:
    """The shares of settings that a run draws.

    Attributes:
        modules: the share that goes the whole way of a user.
        pipeline: the one to try, or ``None`` for all.
        targets: where modules run.
    """

    modules: float = 0.03
    pipeline: str | None = None
    targets: tuple[str, ...] = ("torch",)

    @property
    def arguments(self) -> str:
        """The options of ``refold fuzz`` that say the same, where they are not the default."""
        said = f" --modules {self.modules}" if self.modules != Mix.modules else ""
        said += f" --pipeline {self.pipeline}" if self.pipeline else ""
        if self.targets != Mix.targets:
            said += "".join(f" --target {t}" for t in self.targets)
        return said


def setting_of(seed: int, mix: Mix) -> Setting:
    """How the case of a seed is compiled."""
    rng = random.Random(f"setting {seed}")
    pipeline = mix.pipeline or rng.choice(("default", "default", "default", "min-nodes"))
    if rng.random() < mix.modules:
        options = [o for o in ("bind", "consume", "exclude", "recipe", "sizes", "copy_weights")
                   if rng.random() < 0.15]  # fmt: skip
        if "consume" in options:
            options = [o for o in options if o not in ("recipe", "copy_weights")]
        if mix.pipeline is None and rng.random() < 0.1:
            pipeline = "shift-add"
        (target,) = rng.choices(mix.targets, [_SHARES[t] for t in mix.targets])
        dtype = torch.float32 if target == "ort" else torch.float64  # what its kernels are for
        return Setting("module", pipeline, dtype, options=tuple(options), target=target)
    dtype = torch.float64
    if rng.random() < 0.12:
        dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    return Setting(
        "graph",
        pipeline,
        dtype,
        dynamic=rng.random() < 0.35,
        growth=rng.choice((None, None, None, None, float("inf"), 1.0)),
        recorded=rng.random() < 0.06,
        verified=rng.random() < 0.1,
        exact=dtype is torch.float64 and rng.random() < 0.1,
    )


def network_for(seed: int, setting: Setting) -> DrawnNetwork:
    """The network of a seed, as its setting needs it."""
    return network_of(seed, effects=setting.way == "module", dtype=setting.dtype)


def run_case(seed: int, mix: Mix) -> Outcome:
    """Draws, compiles and judges the case of a seed."""
    setting = setting_of(seed, mix)
    torch.manual_seed(seed)  # of operators that draw: nothing may depend on what ran before
    try:
        network = network_for(seed, setting)
    except Exception as error:  # of the fuzzer itself: it is seen, and the others go on
        return Outcome(seed, setting, CRASH, f"nothing was drawn: {type(error).__name__}: {error}")
    return judge(seed, network, setting)


def judge(seed: int, network: DrawnNetwork, setting: Setting) -> Outcome:
    """Compiles and judges one network."""
    outcome = Outcome(seed, setting, operators=tuple(network.operators))
    failures: list[Decline] = []
    try:
        with watch_failures(failures.append), torch.no_grad():
            way = judge_graph if setting.way == "graph" else judge_module
            way(network, outcome)
    except Breach as breach:
        outcome.kind, outcome.what = WRONG, str(breach)
    except Unclear as unclear:
        outcome.kind, outcome.what = UNJUDGED, str(unclear)
    except Alarm as alarm:
        outcome.kind, outcome.what = ALARM, str(alarm)
    except Unsuited as unsuited:
        outcome.kind, outcome.what = REFUSED, str(unsuited)
    except Exception as error:  # what a fuzzer is for: any of them is a fault
        outcome.kind, outcome.what = CRASH, _named(error)
    if failures and outcome.kind != WRONG:
        first = failures[0]
        outcome.kind, outcome.what = CRASH, f"{first.rule} at {first.node}: {first.reason}"
    return outcome


def _named(error: BaseException) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/refold/" in file and "/refold/fuzz/" not in file:
            place = f" at {file.rpartition('/refold/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"
