"""Upload a captioner to the Hugging Face Hub: once, in the background of a run, or after asking at its end.

huggingface_hub takes the token from the environment variable HF_TOKEN or from the stored login (`hf auth login`). It is
neither printed nor written anywhere.
"""

import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from captioning.common import stopping
from captioning.common.files import CONFIG_FILE, read_json
from captioning.common.hub_errors import LOG_IN, explain, is_final
from captioning.decoding.confidence import KEY as CONFIDENCE
from captioning.sharing.hub_folder import OWN_FOLDERS, copy_checkpoint, source_files, write_folder
from captioning.sharing.model_card import read_facts

STAGING = ".upload_"  # prefix of the folders beside the checkpoint that wait to be uploaded
LATER = "it can be shared later: python MyLLM_Vit_gpt2_captioning/export_to_hub.py user/repo --checkpoint {}"


class HubError(OSError):
    """An upload failed; the message is one line with the reason and a remedy."""


def check_name(repo_id):
    """Raise ValueError unless `repo_id` has the form of a repository's name, "user/repo"."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id, re.ASCII):
        raise ValueError(f'{repo_id!r} is no name of a repository on the Hub; expected "user/repo"')


def check_token():
    """Raise ValueError that says how to get a token if there is none."""
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"there is no Hugging Face token; {LOG_IN}")


def upload(folder, repo_id, private=False, message="Upload captioner", refuse_public=False):
    """Upload everything in `folder` to the repository in one commit -> its address.

    A new repository is created, `private` or public; an existing one keeps its visibility, and if it is public,
    `private` with `refuse_public` raises. Files of the same name are replaced, files of earlier uploads in `source/`
    and `samples/` removed; all others in the repository stay. The commit is the last step, so an interrupted upload
    changes nothing. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and refuse_public and not info.private:
            raise HubError(
                f"{repo_id}: this repository exists already and everybody can read it, but the upload was to be "
                "private; give another name, or make it private in its settings first"
            )
        existing = [entry.rfilename for entry in info.siblings or []]
        obsolete = [name for name in existing if name.startswith(OWN_FOLDERS) and name not in files]
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in obsolete]
        api.create_commit(repo_id, operations, commit_message=message)
        return f"{api.endpoint}/{repo_id}"
    except HubError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP library and Xet raise classes of their own
        raise HubError(f"{repo_id}: not uploaded: {explain(error)}") from error


def message_of(facts):
    """The commit message for a checkpoint, with its epoch and validation perplexity."""
    epoch, perplexity = facts.config.get("best_epoch"), facts.config.get("best_perplexity")
    if epoch is None or perplexity is None:
        return "Upload captioner"
    return f"Upload captioner: epoch {epoch + 1}, validation perplexity {perplexity:.3f}"


def share(checkpoint_folder, repo_id):
    """Upload a checkpoint folder with source code, example and model card -> address; a new repository is private.

    Raises OSError or ValueError with a message of one line.
    """
    check_name(repo_id)
    check_token()
    with tempfile.TemporaryDirectory() as staging:
        facts = read_facts(checkpoint_folder, repo_id)
        copy_checkpoint(staging, checkpoint_folder)
        write_folder(staging, facts, source_files())
        return upload(staging, repo_id, private=True, message=message_of(facts))


def offer_upload(repo_id, checkpoint_folder, shared=False):
    """At the end of a run, ask once on the terminal whether to share the captioner, and do so; Enter means no.

    Without a terminal, or if the run has `shared` it already, nothing is asked; what it shared is uploaded once more if
    it was calibrated since, when the last epoch was over. Errors are only printed, because the results of the run are
    safe.
    """
    if shared and CONFIDENCE in read_json(Path(checkpoint_folder) / CONFIG_FILE):
        try:
            print(f"shared with its confidence: {share(checkpoint_folder, repo_id)}")
        except (OSError, ValueError) as error:
            print(f"shared without its confidence: {error}\n{LATER.format(checkpoint_folder)}")
    if shared or sys.stdin is None or not sys.stdin.isatty():
        return
    question = "Share the captioner on the Hugging Face Hub (a new repository is private)"
    try:
        if repo_id:
            answer = input(f"{question} as {repo_id}? [y/N] ").strip().lower()
            confirmed = answer in ("y", "yes")
        else:
            repo_id = input(f'{question}? Its name, "user/repo" (Enter: no): ').strip()
            confirmed = repo_id.lower() not in ("", "n", "no")
        if confirmed:
            print(f"shared: {share(checkpoint_folder, repo_id)}")
    except (EOFError, KeyboardInterrupt):
        print("\nnot shared")
    except (OSError, ValueError) as error:
        print(f"not shared: {error}\n{LATER.format(checkpoint_folder)}")


def background_uploads(enabled, repo_id, folder):
    """-> `BackgroundUploads` if `enabled`, else `NoUploads`."""
    return BackgroundUploads(repo_id, folder) if enabled else NoUploads()


class NoUploads:
    """The interface of `BackgroundUploads`, doing nothing."""

    def push(self):
        pass

    def finish(self):
        pass


class BackgroundUploads:
    """Uploads the best checkpoint of a run while training continues; a new repository is private.

    One thread uploads, and at most one checkpoint waits for it: when a newer best one comes before its upload has
    begun, the older one is dropped. A failed upload is repeated after each of the `waits` (seconds), then reported; it
    never ends the run.
    """

    def __init__(self, repo_id, folder, waits=(5, 20, 60)):
        """`folder`: the checkpoint's. Raises ValueError if no upload can succeed: without a valid name or a token."""
        if not repo_id:
            raise ValueError('push_every_epoch needs a name: set HF_REPO_ID="user/repo" (constant or environment)')
        check_name(repo_id)
        check_token()
        self.repo_id, self.folder, self.waits = repo_id, Path(folder), waits
        self.source = source_files()  # read now, because files may be edited during the run
        self._waiting = self._thread = None  # `_waiting`: (staging folder, facts) of the next checkpoint to upload
        self._changed = threading.Condition()
        for leftover in self.folder.glob(f"{STAGING}*"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)

    def push(self):
        """Upload the current checkpoint; returns at once."""
        try:
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.folder))
            copy_checkpoint(staging, self.folder, link=True)  # the next epoch replaces the files, not the links
            job = staging, read_facts(self.folder, self.repo_id, scores_files=())
        except (OSError, ValueError) as error:
            print(f"WARNING: this epoch is not uploaded: {error}")
            return
        with self._changed:
            dropped, self._waiting = self._waiting, job
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if dropped:
            shutil.rmtree(dropped[0], ignore_errors=True)

    def finish(self):
        """Wait until the last checkpoint is uploaded or its upload has failed. Ctrl-C ends the wait."""
        with stopping.listening("without the last upload"), self._changed:
            if self._thread is not None:
                print(f"waiting for the upload to {self.repo_id} (Ctrl-C: without it)")
            while self._thread is not None and not stopping.asked():
                self._changed.wait(0.2)
            finished = self._thread is None
        if not finished:
            print(f"the last upload was not finished; {LATER.format(self.folder)}")

    def _work(self):
        while True:
            with self._changed:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            staging, facts = job
            try:
                self._upload(staging, facts)
            except Exception as error:  # an upload must not end a run of days
                print(f"WARNING: {message_of(facts)} failed: {error}")
            shutil.rmtree(staging, ignore_errors=True)

    def _upload(self, staging, facts):
        """Upload, and repeat that after temporary errors until `waits` are used up or a newer checkpoint waits.

        Raises HubError when the Hub refuses the upload, and after the last try.
        """
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # training draws its own
        write_folder(staging, facts, self.source)
        for wait in (*self.waits, None):
            try:
                url = upload(staging, self.repo_id, private=True, message=message_of(facts))
            except HubError as error:
                if wait is None or is_final(error):
                    raise
                print(f"{error}; next try in {wait} seconds")
            else:
                print(f"uploaded to {url}: {message_of(facts).partition(': ')[2]}")
                return
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None, wait):
                    return  # the newer checkpoint is uploaded next
