"""Mixed work on a llorch for a long time, its engine killed now and then."""
