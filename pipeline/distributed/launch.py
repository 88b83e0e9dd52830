"""`--launch NAME`: the same verb in many processes, started by accelerate.

NAME is a file of `configs/accelerate/` or a path to one of accelerate's configurations. accelerate
and torchrun do the work; here they are called with the same verb, and what they print when a
process fails, which has said why itself, is left out.
"""

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.distributed.zero_settings import refuse_without_deepspeed
from pipeline.environment import ASKED_PROCESSES, num_processes
from pipeline.errors import ConfigError, TrainingError

SHIPPED = Path(__file__).parents[2] / "configs" / "accelerate"


@dataclass(frozen=True)
class Machines:
    """Where the processes are, as far as it is not the configuration's to say (None)."""

    processes: int | None = None  # over all machines
    machines: int | None = None
    machine_rank: int | None = None  # of this machine, from 0
    rendezvous: str | None = None  # HOST:PORT on the first machine

    def settings(self, path: Path) -> tuple[int, list[str]]:
        """The number of processes, and the arguments of `accelerate launch`.

        Raises:
            ConfigError: the rendezvous is no HOST:PORT, or DeepSpeed is not installed.
        """
        from accelerate.commands.config.config_args import load_config_from_file

        said = load_config_from_file(str(path))
        if "DEEPSPEED" in str(said.distributed_type):
            refuse_without_deepspeed()
        processes = self.processes or said.num_processes
        given: dict[str, object] = {"config_file": path, "num_processes": processes}
        given |= {"num_machines": self.machines, "machine_rank": self.machine_rank}
        if self.rendezvous is not None:
            host, colon, port = self.rendezvous.rpartition(":")
            if not (host and colon and port.isdigit()):
                raise ConfigError(
                    f"--rendezvous {self.rendezvous}: write HOST:PORT, as 10.0.0.1:29500"
                )
            given |= {"main_process_ip": host, "main_process_port": port}
        elif (self.machines or said.num_machines) == 1 and said.main_process_port is None:
            given["main_process_port"] = 0  # a free one: accelerate's own is always the same
        words = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
        return processes, [word for pair in words for word in pair]


def launch(name: str, where: Machines, arguments: Sequence[str]) -> int:
    """Run `rlhf ARGUMENTS` under the accelerate configuration `name`; returns its exit code.

    Raises:
        ConfigError: there is no such configuration, or accelerate refuses it.
        TrainingError: a process was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if num_processes() > 1:
        raise ConfigError("--launch is for the first process: leave it out under a launcher")
    path = find_configuration(name)
    asked, settings = where.settings(path)
    if path.stem.startswith("cpu"):
        arguments = [*arguments, "run.device=cpu"]
    os.environ[ASKED_PROCESSES] = str(asked)
    # After SIGTERM the step in hand is finished, which torchrun gives 30 s; it ends the others of a
    # process that failed within 30 s all the same.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    # torch's C++ warnings, once a process: DDP takes a value that warms up for an oversight.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args([*settings, "-m", "stages", *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # nobody was left to say why
            raise TrainingError(
                f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}, and the other "
                "processes were stopped. SIGKILL that nobody sent is the system's answer to a lack "
                "of memory"
            ) from error
        return int(failure.exitcode)
    except SignalException as error:  # passed on to the processes, which have answered it
        return 128 + int(error.sigval)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"--launch {name}: {error}") from error
    return 0


def find_configuration(name: str) -> Path:
    """The file of a shipped name, or of a path.

    Raises:
        ConfigError: neither.
    """
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.exists():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    raise ConfigError(f"--launch {name}: no such configuration. There are {names}; or name a file")
