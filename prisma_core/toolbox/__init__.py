"""Tools that plugins share: of adapters of several libraries, and the result of a technique."""
