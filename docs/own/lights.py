"""Data: queries that a function makes, here commands for lamps; anything that gives a list of `Query` will do."""

from dynprune.data.tasks import Query

PARAMETERS = {"type": "dict", "properties": {"level": {"type": "integer", "description": "0 to 100"}}, "required": ["level"]}


def load_lights(rooms: int) -> list[Query]:
    """Two queries for each room's own function; splits are made by function, so there must be some."""
    queries = []
    for room in range(rooms):
        tool = {"name": f"dim_room_{room}", "description": f"Dims the lamp in room {room}.", "parameters": PARAMETERS}
        for level in (20, 80):
            call = {"name": tool["name"], "arguments": {"level": level}}
            # What may be said: for each argument the values that count as right.
            allowed = {tool["name"]: {"level": [level]}}
            messages = ({"role": "user", "content": f"Dim the lamp in room {room} to {level} percent."},)
            queries.append(Query(f"lights_{room}_{level}", "lights", messages, (tool,), (call,), (allowed,)))
    return queries
