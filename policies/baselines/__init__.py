"""Other people's rules as plug-ins, to be measured against: routers and step planners as published."""
