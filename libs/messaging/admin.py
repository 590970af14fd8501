"""Creating and deleting topics."""

from collections.abc import Sequence

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, for_code

from libs.errors import ConfigurationError, TransientError
from libs.settings import KafkaSettings
from schemas.topics import Topic

_UNKNOWN_TOPIC = 3
_TOPIC_ALREADY_EXISTS = 36
_PASSING = frozenset({7, 41})  # REQUEST_TIMED_OUT, NOT_CONTROLLER


async def create_topics(settings: KafkaSettings, topics: Sequence[Topic], replication_factor: int = 1) -> None:
    """Create the topics that do not exist, with the partitions and the retention of their row; the others stay as they are.

    The embedded broker has no administration: there a topic comes into being, with its default of 4 partitions, when a producer asks
    for it; those that need one order are declared when it starts.

    Raises
    ------
    ConfigurationError
        When the broker refuses a topic, or an existing one that needs a single order has more than one partition.
    TransientError
        When the broker cannot be reached.
    """
    if not topics:
        return
    if settings.embedded:
        await _touch(settings, topics)
        return
    client = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers, request_timeout_ms=settings.request_timeout_ms)
    try:
        await client.start()
        try:
            existing = {row["topic"]: len(row["partitions"]) for row in await client.describe_topics([topic.name for topic in topics])}
            for topic in topics:
                if topic.partitions == 1 and existing.get(topic.name, 0) > 1:
                    raise ConfigurationError(
                        f"the topic {topic.name!r} has {existing[topic.name]} partitions; its one order needs exactly 1"
                    )
            missing = [topic for topic in topics if not existing.get(topic.name)]
            if missing:
                answer = await client.create_topics(
                    [NewTopic(topic.name, topic.partitions, replication_factor, topic_configs=topic.config) for topic in missing]
                )
                _check(answer.topic_errors)
        finally:
            await client.close()
    except KafkaError as error:
        raise TransientError(f"the topics could not be created at {settings.bootstrap_servers}: {error!r}") from error


async def delete_topics(settings: KafkaSettings, topics: Sequence[Topic]) -> None:
    """Delete topics with what they hold; those that do not exist are passed over.

    The embedded broker has no administration and keeps its topics, in memory, until it ends.

    Raises
    ------
    ConfigurationError
        When the broker refuses it.
    TransientError
        When the broker cannot be reached, or not all of them are gone yet.
    """
    if settings.embedded or not topics:
        return
    client = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers, request_timeout_ms=settings.request_timeout_ms)
    try:
        try:
            await client.start()
            answer = await client.delete_topics([topic.name for topic in topics])
        finally:
            await client.close()
    except KafkaError as error:
        raise TransientError(f"the topics could not be deleted at {settings.bootstrap_servers}: {error!r}") from error
    for name, code, *_ in answer.topic_error_codes:
        if code in _PASSING:
            raise TransientError(f"the topic {name!r} is not deleted yet: {for_code(code).__name__}")
        if code not in (0, _UNKNOWN_TOPIC):
            raise ConfigurationError(f"the broker refused to delete the topic {name!r}: {for_code(code).__name__}")


async def _touch(settings: KafkaSettings, topics: Sequence[Topic]) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, request_timeout_ms=settings.request_timeout_ms)
    try:
        await producer.start()
        for topic in topics:
            await producer.partitions_for(topic.name)
    except KafkaError as error:
        raise TransientError(f"the topics could not be created at {settings.bootstrap_servers}: {error!r}") from error
    finally:
        await producer.stop()


def _check(errors: Sequence[tuple[str, int, str]]) -> None:
    for name, code, *message in errors:
        if code not in (0, _TOPIC_ALREADY_EXISTS):
            detail = message[0] if message and message[0] else for_code(code).__name__
            raise ConfigurationError(f"the broker refused to create the topic {name!r}: {detail}")
