"""A package, so that processes that tests start find these modules: some libraries install a `tests` of their own."""
