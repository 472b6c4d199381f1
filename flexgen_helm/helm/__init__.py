"""HELM's side of the package: client, runner, tokenizer and window service of flexgen deployments."""
