"""What a run will need and how fast it can be, by arithmetic from its configuration: `uniapl plan`."""
