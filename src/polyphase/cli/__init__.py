"""The command line: what people type, and what they see.

Each command is a file; `app.py` lists them with their flags and imports a command's file only when it runs, so that `--help` is quick.
"""


def main() -> None:
    """Entry point of `polyphase`."""
    from polyphase.cli.app import app

    app(prog_name="polyphase")
