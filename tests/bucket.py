"""moto's S3 on loopback, with the tiny shards in a bucket."""

import threading
from pathlib import Path


class Bucket:
    """moto's S3 with the shards in s3://photos/tiny. `failing`: number of the next requests for shards that get 503."""

    def __init__(self, folder: Path):
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.moto, self.failing, self.requests = DomainDispatcherApplication(create_backend_app), 0, list[str]()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        keys = dict(aws_access_key_id="key", aws_secret_access_key="word", region_name="us-east-1")
        self.client = lambda service: boto3.client(service, endpoint_url=self.endpoint, **keys)
        s3 = self.client("s3")
        s3.create_bucket(Bucket="photos")
        for file in folder.iterdir():
            s3.upload_file(str(file), "photos", f"tiny/{file.name}")

    def _answer(self, environ, start_response):
        name = environ["PATH_INFO"].rpartition("/")[2]
        if environ["REQUEST_METHOD"] == "GET" and name.endswith(".tar"):
            self.requests.append(name)
            if self.failing > 0:
                self.failing -= 1
                start_response("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self.moto(environ, start_response)

    def check_access(self) -> None:
        """From now on moto checks keys and permissions."""
        import requests

        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()

    def close(self) -> None:
        import requests

        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=b"Infinity", timeout=10)
        self._server.shutdown()
        self._server.server_close()
