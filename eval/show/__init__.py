"""Pages, tables, plots, grids."""
