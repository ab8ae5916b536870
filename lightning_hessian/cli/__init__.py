"""The commands of the command line, a module each: ``configure(parser)`` and ``run(options)``."""
