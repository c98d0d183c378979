"""Hook points, hooks as a scope, caches: everything one can do with a module that has hook points."""
