"""Errors of the Hugging Face Hub, or of the connection to it, in one line with a remedy and without the token."""

LOG_IN = "set HF_TOKEN to a token from https://huggingface.co/settings/tokens, or run `hf auth login`"
CONNECTION_ERRORS = {"TransportError", "ConnectionError", "TimeoutError", "Timeout", "gaierror"}  # of any HTTP library
MESSAGES = {  # by HTTP status
    401: f"the Hub refuses the token (401): it is wrong or has expired; {LOG_IN}",
    403: "the Hub does not let this token write there (403); take one with the permission to write, or your own name",
    404: "the Hub has no such repository, or only for those who may see it (404); check the name, or log in with "
    "`hf auth login`",
    429: "the Hub was asked too often (429); try again in some minutes",
}


def explain(error):
    """An exception of huggingface_hub or of the HTTP library behind it -> one line of text with a remedy."""
    error, chain = _root_cause(error)
    status, classes = status_of(error), {cls.__name__ for link in chain for cls in type(link).__mro__}
    if "OfflineModeIsEnabled" in classes or "outgoing traffic has been disabled" in str(error):
        return "the Hub is not asked, because HF_HUB_OFFLINE is set; unset it, or give a folder"
    if "GatedRepoError" in classes:
        return f"the repository asks for your consent on its page ({status}); give it there and {LOG_IN}"
    if "RepositoryNotFoundError" in classes:
        return MESSAGES[404].replace("404", str(status or 404))
    if status in MESSAGES:
        return MESSAGES[status]
    if status is not None and status >= 500:
        return f"the Hub is out of order ({status}); try again later"
    if "LocalTokenNotFoundError" in classes:
        return f"there is no Hugging Face token; {LOG_IN}"
    if "HFValidationError" in classes:
        return 'that is no name of a repository; expected "user/repo"'
    if classes & CONNECTION_ERRORS:
        return "the Hub cannot be reached, or the connection was cut; check the network and try again"
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return _without_token(f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__)


def _root_cause(error):
    """-> (the exception with the Hub's response, or the first cause; the chain of exceptions down to it)."""
    chain = [error]
    while status_of(chain[-1]) is None and chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain[-1], chain


def status_of(error):
    """The HTTP status of an exception's response; None without a response."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_final(error):
    """True when another try would fail in the same way, because the Hub refused the request."""
    error, _ = _root_cause(error)
    return status_of(error) in (400, 401, 402, 403, 404) or isinstance(error, ValueError)


def _without_token(text):
    try:
        from huggingface_hub import get_token

        token = get_token()
    except Exception:  # a broken login must not hide the message
        token = None
    return text.replace(token, "(token)") if token else text
