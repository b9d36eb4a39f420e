"""Programs that import foreign packages. Each runs by its path, in a process of its own, without graphprune."""
