"""Turn text into a Megatron dataset; the same command as ``uar data``. See ``--help``."""

from uar_megatron.data.cli import prepare, run_command

if __name__ == "__main__":
    run_command(prepare)
