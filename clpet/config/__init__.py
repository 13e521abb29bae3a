"""The typed configuration: schema, composition, construction, identity and seeds."""
