"""What a user types: typed overrides of constants, recipes, photo arguments, caption tables."""
