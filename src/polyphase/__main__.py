"""`python -m polyphase`: the command line."""

from polyphase.cli import main

if __name__ == "__main__":
    main()
