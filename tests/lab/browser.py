"""Asking a page in a browser."""

import json


def run(page, script):
    return page.execute_script(f"return {script}")


def requests_of(page):
    """Addresses of everything that the page has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
