"""S3 and what speaks like it: single requests on s3fs's connection, without its own retries."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from qwen_lora.errors import InputError
from qwen_lora.shards.remote.base import ChangedRemotely, RemoteError
from qwen_lora.shards.remote.objects import Answer, Attempts, Facts, NotListed, Objects
from qwen_lora.shards.remote.retries import Transient

CHUNK_BYTES = 1 << 20
PART_BYTES = 16 << 20
MOST_PARTS = 10_000  # of one upload, S3's limit
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
PASSING_CODES = (
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "ThrottlingException",
    "Throttling",
    "ConditionalRequestConflict",  # two conditional writes at once: the next try decides
    "OperationAborted",
    "IncompleteBody",
    "BadDigest",
)
DROPPED = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
    TimeoutError,
)
AGAIN = " meanwhile: run the same command again"
NO_ACCESS = (
    "access denied; are the credentials in the environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), and do they allow it? Some stores also answer so "
    "for what is not there"
)


class S3Objects(Objects):
    """The objects under one prefix of one bucket. Without credentials it asks as anybody may."""

    def __init__(self, bucket: str, prefix: str, label: str, stall_s: float) -> None:
        self._bucket, self._label, self._stall_s = bucket, label, stall_s
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._files = self._connect(anonymous=False)

    def _connect(self, anonymous: bool) -> Any:
        return s3fs.S3FileSystem(
            anon=anonymous,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "retries": {"max_attempts": 0},  # ObjectRemote repeats
                "connect_timeout": min(10.0, self._stall_s),
                "read_timeout": self._stall_s,  # between two pieces, not for the whole
                "max_pool_connections": 64,
            },
        )

    # ---- one request -----------------------------------------------------------------------------

    def _ask(self, method: str, name: str | None, **request: Any) -> dict[str, Any]:
        """One request about one object (None: about the bucket)."""
        key = {} if name is None else {"Key": self._prefix + name}
        what = self._label if name is None else f"{self._label}/{name}"

        async def ask() -> dict[str, Any]:
            await self._files.set_session()
            client = await self._files.get_s3(self._bucket)
            answer: dict[str, Any] = await getattr(client, method)(
                Bucket=self._bucket, **key, **request
            )
            return answer

        try:
            result: dict[str, Any] = self._run(ask, what)
        except _NoCredentials:
            self._files = self._connect(anonymous=True)
            result = self._run(ask, what)
        return result

    def _run(self, make: Callable[[], Coroutine[Any, Any, Any]], what: str) -> Any:
        try:
            return sync(self._files.loop, make)
        except boto.ClientError as error:
            raise _translated(error, what) from None
        except boto.NoCredentialsError:
            if not self._files.anon:
                raise _NoCredentials(f"{what}: no credentials") from None
            raise InputError(f"{what}: no credentials; {NO_ACCESS}") from None
        except DROPPED as error:
            raise Transient(f"{type(error).__name__}: {_short(error)}") from None
        except boto.BotoCoreError as error:  # a profile that is not there, a bucket name, ...
            raise InputError(f"{what}: {_short(error)}") from None

    # ---- requests --------------------------------------------------------------------------------

    def head(self, name: str) -> Facts:
        answer = self._ask("head_object", name)
        return Facts(answer["ContentLength"], answer.get("ETag"))

    def get(self, name: str, start: int, version: str | None) -> Answer:
        conditions = {} if version is None else {"IfMatch": version}
        if start:
            conditions["Range"] = f"bytes={start}-"
        answer = self._ask("get_object", name, **conditions)
        chunks = self._chunks(answer["Body"], name)
        try:
            if str(answer.get("ContentType", "")).startswith("text/html"):
                raise RemoteError(f"{self._label}/{name}: a page of HTML came in its place")
            size = _whole_length(answer, start)
        except BaseException:
            answer["Body"].close()
            raise
        return Answer(Facts(size, answer.get("ETag")), chunks)

    def _chunks(self, body: Any, name: str) -> Generator[bytes]:
        async def some() -> bytes:
            parts: list[bytes] = []
            left = CHUNK_BYTES
            while left > 0:
                try:
                    part = await body.read(left)
                except DROPPED:
                    if not parts:
                        raise
                    break  # what has come counts; the next read says what happened
                if not part:
                    break
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

        try:
            while chunk := self._run(some, f"{self._label}/{name}"):
                yield chunk
        finally:
            self._files.loop.call_soon_threadsafe(body.close)

    def put(self, name: str, data: bytes) -> str | None:
        version: str | None = self._ask("put_object", name, Body=data).get("ETag")
        return version

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        try:
            # also for stores that take the condition and do not look at it
            if self.head(name).version != version:
                raise ChangedRemotely(f"{self._label}/{name} was written by somebody else{AGAIN}")
        except FileNotFoundError:
            if version is not None:
                raise ChangedRemotely(f"{self._label}/{name} is gone{AGAIN}") from None
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self._ask("put_object", name, Body=data, **condition)
        except _NotImplemented:
            return self.put(name, data)
        except FileNotFoundError:  # IfMatch on what was deleted meanwhile
            raise ChangedRemotely(f"{self._label}/{name} is gone{AGAIN}") from None
        etag: str | None = answer.get("ETag")
        return etag

    def upload(self, name: str, source: Path, attempts: Attempts) -> None:
        size = source.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        begun = attempts(lambda: self._ask("create_multipart_upload", name))
        ticket = {"UploadId": begun["UploadId"]}
        parts = []
        try:
            with open(source, "rb") as file:
                for number in range(1, -(-size // part_bytes) + 1):
                    data = file.read(part_bytes)
                    part = {"PartNumber": number, "Body": data, **ticket}
                    answer = attempts(lambda part=part: self._ask("upload_part", name, **part))  # type: ignore[misc]
                    parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            self._complete(name, size, parts, ticket, attempts)
        except BaseException:
            self._abort(name, ticket)
            raise

    def _complete(
        self,
        name: str,
        size: int,
        parts: list[dict[str, Any]],
        ticket: dict[str, Any],
        attempts: Attempts,
    ) -> None:
        whole = {"MultipartUpload": {"Parts": parts}, **ticket}
        try:
            attempts(lambda: self._ask("complete_multipart_upload", name, **whole))
        except FileNotFoundError:
            # No such upload: a first attempt completed it and its answer was lost.
            if attempts(lambda: self.head(name)).size != size:
                raise RemoteError(f"{self._label}/{name}: the upload was ended elsewhere") from None

    def _abort(self, name: str, ticket: dict[str, Any]) -> None:
        """The parts are invisible but cost money; a bucket's lifecycle rule finds what stays."""
        for _ in range(3):
            try:
                self._ask("abort_multipart_upload", name, **ticket)
                return
            except Transient:
                continue
            except (RemoteError, InputError, FileNotFoundError):
                return

    def check_permission(self) -> None:
        """Begins an upload and ends it again: only who may write can, and no object comes of it."""
        name = "manifest.json"
        try:
            begun = self._ask("create_multipart_upload", name)
        except _NotImplemented:
            return
        except RemoteError:
            if not self._files.anon:
                raise
            raise InputError(f"{self._label}: no credentials to write with; {NO_ACCESS}") from None
        self._abort(name, {"UploadId": begun["UploadId"]})

    def delete(self, name: str) -> None:
        self._ask("delete_object", name)

    def names(self) -> list[str]:
        found: list[str] = []
        page: dict[str, Any] = {}
        while True:
            answer = self._ask("list_objects_v2", None, Prefix=self._prefix, Delimiter="/", **page)
            found += [each["Key"].removeprefix(self._prefix) for each in answer.get("Contents", ())]
            if not answer.get("IsTruncated"):
                return [name for name in found if name]
            page = {"ContinuationToken": answer["NextContinuationToken"]}

    def close(self) -> None:
        files = self._files
        if files._s3 is not None:
            sync(files.loop, files._s3creator.__aexit__, None, None, None, timeout=5)


class _NoCredentials(Exception):
    """Nothing to sign with: a public bucket may still answer."""


class _NotImplemented(RemoteError):
    """The store does not know what was asked."""


def _whole_length(answer: dict[str, Any], start: int) -> int:
    """The object's length from an answer to a request for its bytes from `start` on."""
    if not start:
        return int(answer["ContentLength"])
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", str(answer.get("ContentRange", "")))
    if told is None or int(told[1]) != start:
        raise ChangedRemotely(f"the store answered with another range than from byte {start}")
    return int(told[2])


def _translated(error: boto.ClientError, what: str) -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(error.response.get("Error", {}).get("Code", ""))
    told = f"{status} {code}" if code != str(status) else code
    if status in PASSING_STATUS or code in PASSING_CODES:
        return Transient(f"the store answered {told}")
    if code == "NoSuchBucket":
        return InputError(f"{what}: there is no such bucket")
    if status == 404:
        return FileNotFoundError(f"{what} is not there")
    if status == 412 or status == 416:
        return ChangedRemotely(f"{what} is not what it was ({told}){AGAIN}")
    if status in (401, 403):
        kind = NotListed if error.operation_name == "ListObjectsV2" else RemoteError
        return kind(f"{what}: {NO_ACCESS} ({told})")
    if status == 501:
        return _NotImplemented(f"{what}: the store does not know this request ({told})")
    if status in (301, 307, 400) and "egion" in str(error):
        return InputError(f"{what}: the bucket is in another region; set AWS_REGION ({told})")
    return RemoteError(f"{what}: the store refused {error.operation_name} ({told})")


def _short(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
