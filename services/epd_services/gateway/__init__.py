"""The HTTP front: OpenAI-shaped requests in, streamed answers out. Imports no torch.

`app.create_app` builds the application, `dispatch_api` is the only door to the pipeline behind it,
and `fake.FakeDispatcher` stands in for that pipeline.
"""
