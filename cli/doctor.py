"""The verb doctor."""

import sys
from typing import Annotated

import tyro

from cluster.doctor.config import DoctorConfig
from cluster.doctor.finding import Finding
from cluster.doctor.node import node_findings
from cluster.doctor.report import as_json, exit_code, show
from core.config import check
from core.errors import InputError
from core.flags import parse, print_json
from core.launch_environment import ranks_given
from workflow.doctor import Visit, own_rank, spawn_visits


def doctor(arguments: list[str]) -> None:
    """`tapir doctor`."""

    def run(
        config: Annotated[DoctorConfig, tyro.conf.OmitArgPrefixes] = DoctorConfig(),  # noqa: B008
        json: bool = False,
    ) -> None:
        """Check that this machine, cluster and store are ready; each finding says how to fix it.

        By itself it checks this machine; under srun, torchrun or mpirun, or with --ranks, every
        rank checks its own, and rank 0 prints. Exits with 1 if anything is bad.

        Args:
            config: what to check
            json: print a JSON object on the last line
        """
        check(config.problems())
        given = ranks_given()
        if config.ranks and given is not None:
            raise InputError(f"a launcher started {given} ranks already: leave out --ranks")

        def deliver(rows: list[Finding]) -> None:
            show(rows)
            if json:
                print_json(as_json(rows))

        if config.node:
            rows = node_findings(config, own_rank())
            deliver(rows)
        elif config.ranks > 1:
            rows = spawn_visits(config)
            deliver(rows)
        else:
            rows = Visit(config, given or 1, deliver).run()
        sys.exit(exit_code(rows))

    parse(run, arguments, "doctor")
