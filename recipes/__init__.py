"""Recipes: Python modules with ``recipe() -> Recipe``, the only place where all packages meet."""
