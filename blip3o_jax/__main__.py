"""Run the `blip3o` command, also as `python -m blip3o_jax`."""

from blip3o_jax import exits


def run() -> None:
    """Run the command and end the process, with one line for any error that a user can cause and
    for Ctrl-C, also while modules are still being imported.
    """
    exits.install()

    def main() -> int:
        from blip3o_jax import cli

        return cli.main()

    exits.run(main)


if __name__ == "__main__":  # worker processes import this module; only the parent runs the command
    run()
