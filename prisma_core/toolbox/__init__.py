"""Tools that plugins and rooms share: readers and rows of adapters, arguments, precision, the result of a technique."""
