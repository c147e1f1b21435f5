"""The HTTP front of an agent: the same routes for every agent, derived from its declaration.

`app.create_app` makes one agent's application, `server.serve` runs the fronts of several in one
process. A front accepts work while the broker is away, because it writes rows and knows no Celery.
Nothing is imported here: commands that use a part of it need no server.
"""
