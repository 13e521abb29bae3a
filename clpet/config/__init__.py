"""The configuration: schema, composition, construction of objects, identity of a run, and seeds."""
