"""The command line: typed overrides of constants, recipes, the tools' parser, photo arguments, caption tables."""
