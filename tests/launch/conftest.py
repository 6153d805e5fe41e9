"""One SLURM for all tests of a session, where there can be one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import NoSlurmError, SlurmCluster, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Three nodes, found by the SLURM commands of this process and of its children."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            with cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
                patch.setenv("SLURM_CONF", running.environment["SLURM_CONF"])
                yield running
        except NoSlurmError as error:
            pytest.skip(f"NOTHING OF SLURM IS TESTED: {error}")
