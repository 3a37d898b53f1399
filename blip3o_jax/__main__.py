"""The `blip3o` command, also as `python -m blip3o_jax`."""

from blip3o_jax import exits


def run() -> None:
    """Runs the command and ends the process, in one line for whatever a user can cause, Ctrl-C at
    any moment among it.
    """
    exits.install()

    def main() -> int:
        from blip3o_jax import cli

        return cli.main()

    exits.run(main)


if __name__ == "__main__":  # worker processes import this module; only the parent runs the command
    run()
