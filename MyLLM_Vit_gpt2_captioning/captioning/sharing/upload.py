"""Sharing a captioner on the Hugging Face Hub: one upload, uploads in the background of a run, the offer at its end.

huggingface_hub takes the token from the environment variable HF_TOKEN or from the stored login (`hf auth login`). It is
neither printed nor written anywhere.
"""

import re
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from captioning.common.hub_errors import LOG_IN, explain, is_final
from captioning.sharing.hub_folder import OWN_FOLDERS, place_checkpoint, source_files, write_folder
from captioning.sharing.model_card import read_facts

STAGING = ".upload_"  # folders beside the checkpoint that wait to be uploaded
LATER = "it can be shared later: python MyLLM_Vit_gpt2_captioning/export_to_hub.py user/repo --checkpoint {}"


class HubError(OSError):
    """An upload failed; the text is one line that says why, with a remedy."""


def check_name(repo_id):
    """Raise ValueError unless this can be the name of a repository, "user/repo"."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id, re.ASCII):
        raise ValueError(f'{repo_id!r} is no name of a repository on the Hub; expected "user/repo"')


def check_token():
    """Raise ValueError that says how to get one where there is no token."""
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"there is no Hugging Face token; {LOG_IN}")


def upload(folder, repo_id, private=False, message="Upload captioner", insist=False):
    """Put everything in `folder` into the repository in one commit -> its address. It is made if it is not there yet,
    `private` or not; one that is there stays what it is, but with `insist` nothing private goes to a public one.

    Files of the same name are replaced; what an earlier upload left in `source/` and `samples/` is removed, and
    anything else in the repository stays. The commit is the last step: an upload that is cut off changes nothing.
    Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and insist and not info.private:
            raise HubError(
                f"{repo_id}: this repository is there already and everybody can read it, but the upload was to be "
                "private; give another name, or make it private in its settings first"
            )
        there = [entry.rfilename for entry in info.siblings or []]
        gone = [name for name in there if name.startswith(OWN_FOLDERS) and name not in files]
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        api.create_commit(repo_id, operations, commit_message=message)
        return f"{api.endpoint}/{repo_id}"
    except HubError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP library or Xet: each has its own
        raise HubError(f"{repo_id}: not uploaded: {explain(error)}") from error


def message_of(facts):
    """What a commit is called: which epoch it holds and how good that is."""
    epoch, value = facts.config.get("best_epoch"), facts.config.get("best_perplexity")
    if epoch is None or value is None:
        return "Upload captioner"
    return f"Upload captioner: epoch {epoch + 1}, validation perplexity {value:.3f}"


def share(checkpoint_folder, repo_id):
    """Upload a checkpoint folder with source, example and model card -> address; a new repository is private.

    Raises OSError or ValueError that says in one line what is wrong.
    """
    check_name(repo_id)
    check_token()
    with tempfile.TemporaryDirectory() as place:
        facts = read_facts(checkpoint_folder, repo_id)
        place_checkpoint(place, checkpoint_folder)
        write_folder(place, facts, source_files())
        return upload(place, repo_id, private=True, message=message_of(facts))


def offer_upload(repo_id, checkpoint_folder, shared=False):
    """At the end of a run on a terminal: ask once whether to share the captioner, and do it. Enter means no.

    Nothing is asked where nobody can answer, or where the run has `shared` it already. What goes wrong is printed; the
    run is over and its results are safe.
    """
    if shared or sys.stdin is None or not sys.stdin.isatty():
        return
    question = "Share the captioner on the Hugging Face Hub (a new repository is private)"
    try:
        if repo_id:
            answer = input(f"{question} as {repo_id}? [y/N] ").strip().lower()
            wanted = answer in ("y", "yes")
        else:
            repo_id = input(f'{question}? Its name, "user/repo" (Enter: no): ').strip()
            wanted = repo_id.lower() not in ("", "n", "no")
        if wanted:
            print(f"shared: {share(checkpoint_folder, repo_id)}")
    except (EOFError, KeyboardInterrupt):
        print("\nnot shared")
    except (OSError, ValueError) as error:
        print(f"not shared: {error}\n{LATER.format(checkpoint_folder)}")


def background_uploads(wanted, repo_id, folder):
    """-> `BackgroundUploads` of a run, or what uploads nothing."""
    return BackgroundUploads(repo_id, folder) if wanted else NoUploads()


class NoUploads:
    """In the place of `BackgroundUploads`."""

    def push(self):
        pass

    def finish(self):
        pass


class BackgroundUploads:
    """Uploads the best checkpoint of a run while training goes on, to a repository that is private when it is new.

    One thread does it, and only the newest checkpoint waits: when the best epoch changes before an upload has begun,
    the older one is dropped. What fails is tried again after `waits` seconds each, then reported; it never ends a run.
    """

    def __init__(self, repo_id, folder, waits=(5, 20, 60)):
        """`folder`: that of the checkpoint. Raises ValueError where no upload could ever work: no name, no token."""
        if not repo_id:
            raise ValueError('push_every_epoch needs a name: set HF_REPO_ID="user/repo" (constant or environment)')
        check_name(repo_id)
        check_token()
        self.repo_id, self.folder, self.waits = repo_id, Path(folder), waits
        self.source = source_files()  # as it is now: it may be edited while the run goes on
        self._waiting = self._thread = None  # (staging folder, facts) of the newest checkpoint
        self._changed = threading.Condition()
        for left in self.folder.glob(f"{STAGING}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def push(self):
        """Upload what is the checkpoint now; returns at once."""
        try:
            place = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.folder))
            place_checkpoint(place, self.folder, link=True)  # stays as it is when the next epoch replaces the files
            job = place, read_facts(self.folder, self.repo_id, scores_files=())
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
        """Wait until the newest checkpoint is uploaded or given up. Ctrl-C stops waiting."""
        try:
            with self._changed:
                if self._thread is not None:
                    print(f"waiting for the upload to {self.repo_id} (Ctrl-C: without it)")
                self._changed.wait_for(lambda: self._thread is None)
        except KeyboardInterrupt:
            print(f"the last upload was left; {LATER.format(self.folder)}")

    def _work(self):
        while True:
            with self._changed:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            place, facts = job
            try:
                self._upload(place, facts)
            except Exception as error:  # a run of days does not end because of its uploads
                print(f"WARNING: {message_of(facts)} failed: {error}")
            shutil.rmtree(place, ignore_errors=True)

    def _upload(self, place, facts):
        """Try until it works, is refused for good, has been tried often enough, or something newer waits."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # training draws its own
        write_folder(place, facts, self.source)
        for wait in (*self.waits, None):
            try:
                url = upload(place, self.repo_id, private=True, message=message_of(facts))
            except HubError as error:
                if wait is None or is_final(error):
                    raise
                print(f"{error}; next try in {wait} seconds")
            else:
                print(f"uploaded to {url}: {message_of(facts).partition(': ')[2]}")
                return
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None, wait):
                    return  # the newer one is tried next
