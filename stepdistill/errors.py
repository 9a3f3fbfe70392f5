"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Something a user gave is wrong: a config, a file, a teacher, a folder.

    The message is one line that names the thing, what is wrong with it, and the remedy.  The command
    line prints it without a traceback and exits with code 2.
    """
