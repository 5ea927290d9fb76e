PY := .venv/bin/python

.PHONY: proto
proto:
	$(PY) -m grpc_tools.protoc -Iproto --python_out=src --pyi_out=src --grpc_python_out=src proto/tandem/v1/*.proto
