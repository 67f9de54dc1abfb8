"""Completions that try to earn what they did not, or that a sloppy parser would misread: strict verdict and why.

A case is (completion, acc, format, pred, why); the right answer is C ("CT") of ROW's options, style think unless the
table says otherwise. acc is paid from the one answer block only; format for exactly the blocks of the style, none
empty, nothing but white space around them.
"""

import pytest

from medr1_verl.parsing import parse, why_malformed
from medr1_verl.reward import compute_score

OPTIONS = ["MRI", "X-ray", "CT", "No."]

THINK = [
    # --- what is right
    ("<think>x</think><answer>C</answer>", 1, 1, "C", "plain"),
    ("<think>x</think>\n<answer>C</answer>", 1, 1, "C", "line feed between the blocks"),
    ("<think>x</think>\r\n\r\n<answer>C</answer>\r\n", 1, 1, "C", "CRLF between and after"),
    ("\n\t <think>x</think><answer>C</answer> \n", 1, 1, "C", "white space around"),
    ("\u00a0\u3000<think>x</think>\u2003<answer>C</answer>\u2028", 1, 1, "C", "Unicode white space around"),
    ("<think>\nx\ny\n</think>\n<answer>\nC\n</answer>", 1, 1, "C", "line feeds inside"),
    ("<think>x</think><answer>\r\nC\r\n</answer>", 1, 1, "C", "CRLF inside the answer"),
    ("<think>x</think><answer>\u00a0C\u00a0</answer>", 1, 1, "C", "no-break spaces around the letter"),
    ("<think>x</think><answer>c</answer>", 1, 1, "C", "lower case"),
    ("<think>x</think><answer>C.</answer>", 1, 1, "C", "one trailing period"),
    ("<think>x</think><answer>C)</answer>", 1, 1, "C", "one trailing parenthesis"),
    ("<think>x</think><answer>c.</answer>", 1, 1, "C", "lower case with period"),
    ("<think>x</think><answer>c)</answer>", 1, 1, "C", "lower case with parenthesis"),
    ("<think>x</think><answer>CT</answer>", 1, 1, "C", "the option's own text"),
    ("<think>x</think><answer> ct </answer>", 1, 1, "C", "its text in lower case"),
    ("<think>x</think><answer>CT.</answer>", 1, 1, "C", "its text with a final period"),
    ("<think>5 < 6 > 4</think><answer>C</answer>", 1, 1, "C", "angle brackets in the reasoning"),
    ("<think>a <b>bold</b> word</think><answer>C</answer>", 1, 1, "C", "another tag in the reasoning is text"),
    ("<think>A or B? Surely D.</think><answer>C</answer>", 1, 1, "C", "letters in the reasoning do not count"),
    ("<think>\\boxed{A}</think><answer>C</answer>", 1, 1, "C", "a box in the reasoning does not count"),
    ("<think>The answer is A</think><answer>C</answer>", 1, 1, "C", "a sentence in the reasoning does not count"),
    ("<think>&lt;answer&gt;A&lt;/answer&gt;</think><answer>C</answer>", 1, 1, "C", "entities in reasoning are text"),
    ("<think>Réflexion — 影像显示…</think><answer>C</answer>", 1, 1, "C", "any script in the reasoning"),
    ("<think>🫁</think><answer>C</answer>", 1, 1, "C", "an emoji is a mark on the page"),
    ("<think><</think><answer>C</answer>", 1, 1, "C", "a lone angle bracket is reasoning, if poor"),
    ("<think>.</think><answer>C</answer>", 1, 1, "C", "a period too; the length part is for that"),
    ("<think><Answer>A</Answer></think><answer>C</answer>", 1, 1, "C", "mis-cased tags are no tags"),
    ("<think>< think > </ think ></think><answer>C</answer>", 1, 1, "C", "tags with spaces are no tags"),
    ("<think>x<thinking></think><answer>C</answer>", 1, 1, "C", "<thinking> is no tag of a block"),
    ("<think>x</thinking></think><answer>C</answer>", 1, 1, "C", "nor is </thinking>"),
    # --- a right format and a wrong answer
    ("<think>x</think><answer>A</answer>", 0, 1, "A", "another option"),
    ("<think>x</think><answer>b</answer>", 0, 1, "B", "another option, lower case"),
    ("<think>x</think><answer>MRI</answer>", 0, 1, "A", "another option's text"),
    ("<think>x</think><answer>x-ray.</answer>", 0, 1, "B", "another option's text, respelt"),
    ("<think>x</think><answer>No</answer>", 0, 1, "D", "another option's text without its period"),
    ("<think>x</think><answer>E</answer>", 0, 1, "", "a letter that this question does not have"),
    ("<think>x</think><answer>Z.</answer>", 0, 1, "", "nor this"),
    ("<think>The answer is C</think><answer>A</answer>", 0, 1, "A", "the right letter only in the reasoning"),
    ("<think>\\boxed{C}</think><answer>A</answer>", 0, 1, "A", "the right letter only in a box"),
    # --- an answer that is not one option
    ("<think>x</think><answer>A or C</answer>", 0, 1, "", "two letters"),
    ("<think>x</think><answer>A, C</answer>", 0, 1, "", "a list"),
    ("<think>x</think><answer>C, C</answer>", 0, 1, "", "the same letter twice is not one letter"),
    ("<think>x</think><answer>ABCD</answer>", 0, 1, "", "all letters"),
    ("<think>x</think><answer>A/B/C/D</answer>", 0, 1, "", "all letters with slashes"),
    ("<think>x</think><answer>C C</answer>", 0, 1, "", "repeated letter"),
    ("<think>x</think><answer>CC</answer>", 0, 1, "", "repeated letter without space"),
    ("<think>x</think><answer>A\nC</answer>", 0, 1, "", "a letter a line"),
    ("<think>x</think><answer>not C</answer>", 0, 1, "", "a negation"),
    ("<think>x</think><answer>C?</answer>", 0, 1, "", "question mark"),
    ("<think>x</think><answer>C!</answer>", 0, 1, "", "exclamation mark"),
    ("<think>x</think><answer>C,</answer>", 0, 1, "", "comma"),
    ("<think>x</think><answer>C:</answer>", 0, 1, "", "colon"),
    ("<think>x</think><answer>C..</answer>", 0, 1, "", "two periods"),
    ("<think>x</think><answer>C.)</answer>", 0, 1, "", "period and parenthesis"),
    ("<think>x</think><answer>C))</answer>", 0, 1, "", "two parentheses"),
    ("<think>x</think><answer>C .</answer>", 0, 1, "", "space before the period"),
    ("<think>x</think><answer>(C)</answer>", 0, 1, "", "parenthesis on both sides"),
    ("<think>x</think><answer>[C]</answer>", 0, 1, "", "brackets"),
    ("<think>x</think><answer>{C}</answer>", 0, 1, "", "braces"),
    ("<think>x</think><answer>'C'</answer>", 0, 1, "", "quotes"),
    ('<think>x</think><answer>"C"</answer>', 0, 1, "", "double quotes"),
    ("<think>x</think><answer>**C**</answer>", 0, 1, "", "markdown bold"),
    ("<think>x</think><answer>`C`</answer>", 0, 1, "", "markdown code"),
    ("<think>x</think><answer>```\nC\n```</answer>", 0, 1, "", "markdown fence inside the answer"),
    ("<think>x</think><answer>$C$</answer>", 0, 1, "", "mathematics"),
    ("<think>x</think><answer>\\boxed{C}</answer>", 0, 1, "", "a box"),
    ("<think>x</think><answer>- C</answer>", 0, 1, "", "list item"),
    ("<think>x</think><answer>C) CT</answer>", 0, 1, "", "letter and text: neither one nor the other"),
    ("<think>x</think><answer>C)CT</answer>", 0, 1, "", "as in the released prompt's options"),
    ("<think>x</think><answer>C. CT</answer>", 0, 1, "", "letter, period and text"),
    ("<think>x</think><answer>C: CT</answer>", 0, 1, "", "letter, colon and text"),
    ("<think>x</think><answer>C) MRI</answer>", 0, 1, "", "right letter, wrong text"),
    ("<think>x</think><answer>Option C</answer>", 0, 1, "", "a word before the letter"),
    ("<think>x</think><answer>The answer is C</answer>", 0, 1, "", "a sentence"),
    ("<think>x</think><answer>answer: C</answer>", 0, 1, "", "a label"),
    ("<think>x</think><answer>C because of the bone</answer>", 0, 1, "", "a reason after the letter"),
    ("<think>x</think><answer>C T</answer>", 0, 1, "", "the text with a space in it is another text"),
    ("<think>x</think><answer>CT scan</answer>", 0, 1, "", "more than the option's text"),
    ("<think>x</think><answer>computed tomography</answer>", 0, 1, "", "a synonym is not the option's own text"),
    ("<think>x</think><answer>MRI or CT</answer>", 0, 1, "", "two options' texts"),
    ("<think>x</think><answer>3</answer>", 0, 1, "", "the option's number"),
    ("<think>x</think><answer>None</answer>", 0, 1, "", "none of them"),
    ("<think>x</think><answer>C<br></answer>", 0, 1, "", "HTML in the answer"),
    ("<think>x</think><answer><b>C</b></answer>", 0, 1, "", "HTML around the letter"),
    ("<think>x</think><answer>&#67;</answer>", 0, 1, "", "HTML entity for C"),
    ("<think>x</think><answer>&nbsp;C</answer>", 0, 1, "", "HTML entity for a space"),
    ("<think>x</think><answer>%43</answer>", 0, 1, "", "URL escape for C"),
    ("<think>x</think><answer>\\u0043</answer>", 0, 1, "", "an escape spelt out"),
    ("<think>x</think><answer><answer_c></answer>", 0, 1, "", "a tag-like word as the answer"),
    # --- look-alikes and invisible characters
    ("<think>x</think><answer>\uff23</answer>", 0, 1, "", "full-width C"),
    ("<think>x</think><answer>\u0421</answer>", 0, 1, "", "Cyrillic Es"),
    ("<think>x</think><answer>\u0441</answer>", 0, 1, "", "Cyrillic es, lower case"),
    ("<think>x</think><answer>\u03f9</answer>", 0, 1, "", "Greek lunate sigma"),
    ("<think>x</think><answer>\u216d</answer>", 0, 1, "", "Roman numeral hundred"),
    ("<think>x</think><answer>\u24b8</answer>", 0, 1, "", "circled C"),
    ("<think>x</think><answer>\U0001d402</answer>", 0, 1, "", "mathematical bold C"),
    ("<think>x</think><answer>\U0001f172</answer>", 0, 1, "", "negative squared C"),
    ("<think>x</think><answer>\u00c7</answer>", 0, 1, "", "C with cedilla"),
    ("<think>x</think><answer>C\u0327</answer>", 0, 1, "", "C with a combining cedilla"),
    ("<think>x</think><answer>\u00a9</answer>", 0, 1, "", "copyright sign"),
    ("<think>x</think><answer>C\u3002</answer>", 0, 1, "", "ideographic full stop"),
    ("<think>x</think><answer>C\uff09</answer>", 0, 1, "", "full-width parenthesis"),
    ("<think>x</think><answer>C\u2024</answer>", 0, 1, "", "one-dot leader"),
    ("<think>x</think><answer>\u200bC</answer>", 0, 1, "", "zero-width space before the letter"),
    ("<think>x</think><answer>C\u200d</answer>", 0, 1, "", "zero-width joiner after it"),
    ("<think>x</think><answer>\ufeffC</answer>", 0, 1, "", "byte-order mark before it"),
    ("<think>x</think><answer>\u202eC</answer>", 0, 1, "", "right-to-left override"),
    ("<think>x</think><answer>C\x00</answer>", 0, 1, "", "NUL after it"),
    ("<think>x</think><answer>\x1b[1mC</answer>", 0, 1, "", "terminal escape before it"),
    ("<think>x</think><ans\u200bwer>C</answer>", 0, 0, "", "zero-width space in a tag"),
    ("<think>x</think><\u0430nswer>C</\u0430nswer>", 0, 0, "", "Cyrillic a in the tags"),
    ("\uff1cthink\uff1ex\uff1c/think\uff1e\uff1canswer\uff1eC\uff1c/answer\uff1e", 0, 0, "", "full-width brackets"),
    ("\u200b<think>x</think><answer>C</answer>", 1, 0, "C", "a zero-width space outside is not white space"),
    ("<think>x</think><answer>C</answer>\ufeff", 1, 0, "C", "nor is a byte-order mark"),
    ("<think>x</think>\u200b<answer>C</answer>", 1, 0, "C", "nor one between the blocks"),
    # --- empty and white-space blocks
    ("<think></think><answer>C</answer>", 1, 0, "C", "empty reasoning"),
    ("<think> \n\t </think><answer>C</answer>", 1, 0, "C", "white space for reasoning"),
    ("<think>\u00a0\u3000</think><answer>C</answer>", 1, 0, "C", "Unicode white space for reasoning"),
    ("<think>\u200b\u200d\ufeff</think><answer>C</answer>", 1, 0, "C", "invisible characters for reasoning"),
    ("<think> \u2060 \u00ad </think><answer>C</answer>", 1, 0, "C", "white space and invisible characters"),
    ("<think>x</think><answer></answer>", 0, 0, "", "empty answer"),
    ("<think>x</think><answer> \n </answer>", 0, 0, "", "white space for an answer"),
    ("<think></think><answer></answer>", 0, 0, "", "both empty"),
    ("", 0, 0, "", "nothing at all"),
    (" \n\t", 0, 0, "", "white space only"),
    # --- no blocks, one block
    ("C", 0, 0, "", "a bare letter"),
    ("C.", 0, 0, "", "a bare letter with a period"),
    ("CT", 0, 0, "", "the bare text"),
    ("The answer is C", 0, 0, "", "a sentence without blocks"),
    ("Answer: C", 0, 0, "", "a label without blocks"),
    ("\\boxed{C}", 0, 0, "", "a box without blocks"),
    ("<think>C</think>", 0, 0, "", "reasoning only"),
    ("<think>x</think>C", 0, 0, "", "letter after the reasoning, without its block"),
    ("<answer>C</answer>", 1, 0, "C", "the answer block without reasoning"),
    # --- repeated blocks
    ("<think>x</think><answer>C</answer><answer>A</answer>", 0, 0, "", "a second answer"),
    ("<think>x</think><answer>A</answer><answer>C</answer>", 0, 0, "", "a second answer, the right one last"),
    ("<think>x</think><answer>C</answer><answer>C</answer>", 0, 0, "", "the same answer twice"),
    ("<think>x</think><answer>A</answer> or <answer>C</answer>", 0, 0, "", "a hedge in two blocks"),
    ("<think>x</think>" + "".join(f"<answer>{x}</answer>" for x in "ABCD"), 0, 0, "", "an answer of each"),
    ("<think>x</think><think>y</think><answer>C</answer>", 1, 0, "C", "reasoning twice"),
    ("<think>x</think><answer>C</answer><think>y</think>", 1, 0, "C", "reasoning before and after"),
    ("<think>x</think><answer>C</answer>" * 2, 0, 0, "", "everything twice"),
    ("<think>x</think><answer><answer>C</answer></answer>", 0, 0, "", "nested answer"),
    ("<think><think>x</think></think><answer>C</answer>", 1, 0, "C", "nested reasoning"),
    ("<think>x</think><answer>C</answer></answer>", 0, 0, "", "a closing tag too many"),
    ("<think>x</think><answer><answer>C</answer>", 0, 0, "", "an opening tag too many"),
    ("<think>x</think></think><answer>C</answer>", 1, 0, "C", "a closing reasoning tag too many"),
    ("<think><think>x</think><answer>C</answer>", 1, 0, "C", "an opening reasoning tag too many"),
    # --- tags inside the other block
    ("<think>I say <answer>A</answer></think><answer>C</answer>", 0, 0, "", "an answer inside the reasoning"),
    ("<think>I say <answer>C</answer></think><answer>A</answer>", 0, 0, "", "the right answer inside the reasoning"),
    ("<think>the <answer> tag</think><answer>C</answer>", 0, 0, "", "an opening tag in the reasoning"),
    ("<think>the </answer> tag</think><answer>C</answer>", 0, 0, "", "a closing tag in the reasoning"),
    ("<think>x<answer>C</answer></think>", 0, 0, "", "the only answer stands inside the reasoning"),
    ("<think>x</think><answer><think>y</think>C</answer>", 0, 0, "", "reasoning inside the answer"),
    ("<think>x</think><answer>C<think></answer>", 0, 0, "", "a reasoning tag inside the answer"),
    ("<think>x</think><answer>C</think></answer>", 0, 0, "", "a closing reasoning tag inside the answer"),
    ("<think>x<answer></think>C</answer>", 0, 0, "", "blocks that overlap"),
    # --- reordered
    ("<answer>C</answer><think>x</think>", 1, 0, "C", "the order of think-after"),
    ("</think>x<think><answer>C</answer>", 0, 0, "", "reasoning inside out leaves it open"),
    ("<think>x</think></answer>C<answer>", 0, 0, "", "answer inside out"),
    ("<answer>C<think>x</answer></think>", 0, 0, "", "crossed"),
    # --- unclosed
    ("<think>x", 0, 0, "", "cut in the reasoning"),
    ("<think>x</think>", 0, 0, "", "cut after the reasoning"),
    ("<think>x</think><answer>", 0, 0, "", "cut before the letter"),
    ("<think>x</think><answer>C", 0, 0, "", "cut after the letter"),
    ("<think>x</think><answer>C</answer", 0, 0, "", "cut in the last tag"),
    ("<think>x</think>C</answer>", 0, 0, "", "answer not opened"),
    ("x</think><answer>C</answer>", 1, 0, "C", "reasoning not opened"),
    ("<think>x<answer>C</answer>", 0, 0, "", "reasoning not closed: the answer stands inside it"),
    ("think>x</think><answer>C</answer>", 1, 0, "C", "first bracket missing"),
    # --- misspelt and mixed case
    ("<THINK>x</THINK><ANSWER>C</ANSWER>", 0, 0, "", "upper-case tags"),
    ("<Think>x</Think><Answer>C</Answer>", 0, 0, "", "capitalized tags"),
    ("<think>x</Think><answer>C</answer>", 0, 0, "", "closing tag in another case leaves the reasoning open"),
    ("<think>x</think><answer>C</Answer>", 0, 0, "", "closing answer tag in another case"),
    ("<thinking>x</thinking><answer>C</answer>", 1, 0, "C", "<thinking>"),
    ("<thought>x</thought><answer>C</answer>", 1, 0, "C", "<thought>"),
    ("<think>x</think><ans>C</ans>", 0, 0, "", "<ans>"),
    ("<think>x</think><anwser>C</anwser>", 0, 0, "", "<anwser>"),
    ("<think>x</think><final_answer>C</final_answer>", 0, 0, "", "<final_answer>"),
    ("< think>x</think><answer>C</answer>", 1, 0, "C", "space in the opening tag"),
    ("<think>x</think>< answer>C</answer>", 0, 0, "", "space in the opening answer tag"),
    ("<think>x</think><answer >C</answer>", 0, 0, "", "space before the bracket"),
    ("<think>x</think><answer>C</ answer>", 0, 0, "", "space after the slash"),
    ('<think>x</think><answer id="1">C</answer>', 0, 0, "", "attribute"),
    ("<think>x</think><answer/>C", 0, 0, "", "self-closing tag"),
    ("<think>x<think/><answer>C<answer/>", 0, 0, "", "slash on the wrong side"),
    ("[think]x[/think][answer]C[/answer]", 0, 0, "", "square brackets"),
    ("&lt;think&gt;x&lt;/think&gt;&lt;answer&gt;C&lt;/answer&gt;", 0, 0, "", "tags as HTML entities"),
    ("<think>x</think>&lt;answer&gt;C&lt;/answer&gt;", 0, 0, "", "answer tags as entities"),
    ("<<think>>x<</think>><<answer>>C<</answer>>", 0, 0, "", "doubled brackets leave '>C<' for an answer"),
    # --- text outside
    ("x<think>x</think><answer>C</answer>", 1, 0, "C", "text before"),
    ("<think>x</think> so <answer>C</answer>", 1, 0, "C", "text between"),
    ("<think>x</think><answer>C</answer> The image shows...", 1, 0, "C", "text after"),
    ("<think>x</think>.<answer>C</answer>", 1, 0, "C", "a period between"),
    ("<think>x</think><answer>C</answer>.", 1, 0, "C", "a period after"),
    ("<think>x</think><answer>C</answer>A", 1, 0, "C", "another letter after"),
    ("C<think>x</think><answer>A</answer>", 0, 0, "A", "the right letter before"),
    ("```\n<think>x</think><answer>C</answer>\n```", 1, 0, "C", "markdown fence around"),
    ("```xml\n<think>x</think>\n<answer>C</answer>\n```", 1, 0, "C", "markdown fence with a language"),
    ("<html><think>x</think><answer>C</answer></html>", 1, 0, "C", "another tag around"),
    ("<think>x</think><br><answer>C</answer>", 1, 0, "C", "another tag between"),
    ("assistant\n<think>x</think><answer>C</answer>", 1, 0, "C", "a role name before"),
    ("<think>x</think><answer>C</answer>\nuser\nNext question", 1, 0, "C", "a made-up turn after"),
    ("\\n<think>x</think>\\n<answer>C</answer>", 1, 0, "C", "a backslash and an n are text"),
    # --- special tokens that were not removed
    ("<think>x</think><answer>C</answer><|im_end|>", 1, 0, "C", "end of turn"),
    ("<|im_start|>assistant\n<think>x</think><answer>C</answer>", 1, 0, "C", "start of turn"),
    ("<think>x</think><answer>C<|im_end|></answer>", 0, 1, "", "end of turn inside the answer"),
    ("<think>x<|endoftext|></think><answer>C</answer>", 1, 1, "C", "inside the reasoning it is text"),
    ("<think><|vision_start|><|image_pad|><|vision_end|></think><answer>C</answer>", 1, 1, "C", "vision tokens too"),
    ("<think>x</think><answer><|box_start|>C<|box_end|></answer>", 0, 1, "", "box tokens around the letter"),
    # --- 100 KB
    ("<think>" + "word " * 20_000 + "</think><answer>C</answer>", 1, 1, "C", "long reasoning is no fault here"),
    ("<think>" + "<" * 100_000 + "</think><answer>C</answer>", 1, 1, "C", "100 KB of brackets"),
    ("<think>" * 14_000 + "x</think><answer>C</answer>", 1, 0, "C", "100 KB of opening tags"),
    ("<think>x</think><answer>" * 4_000 + "C</answer>", 0, 0, "", "100 KB of both openings"),
    ("<answer>C</answer>" * 5_500, 0, 0, "", "100 KB of answers"),
    ("<think>x</think><answer>" + "C" * 100_000 + "</answer>", 0, 1, "", "100 KB of the right letter"),
    ("<think>x</think><answer>" + " " * 50_000 + "C" + "\n" * 50_000 + "</answer>", 1, 1, "C", "100 KB of white space"),
    (" " * 100_000 + "<think>x</think><answer>C</answer>", 1, 1, "C", "100 KB of white space before"),
    ("<think>" + "\u200b" * 100_000 + "</think><answer>C</answer>", 1, 0, "C", "100 KB of nothing to see"),
]

NO_THINK = [
    ("<answer>C</answer>", 1, 1, "C", "plain"),
    (" \n<answer> c) </answer>\n", 1, 1, "C", "white space, case, parenthesis"),
    ("C", 0, 0, "", "a bare letter"),
    ("<answer>A</answer>", 0, 1, "A", "wrong"),
    ("<answer></answer>", 0, 0, "", "empty"),
    ("<answer>C</answer><answer>C</answer>", 0, 0, "", "twice"),
    ("<think>x</think><answer>C</answer>", 1, 0, "C", "reasoning has no place in this style"),
    ("<answer>C</answer><think>x</think>", 1, 0, "C", "nor after"),
    ("<answer><think>x</think>C</answer>", 0, 0, "", "nor inside"),
    ("<think>x<answer>C</answer>", 0, 0, "", "inside reasoning that is never closed"),
    ("It is <answer>C</answer>", 1, 0, "C", "text before"),
    ("<answer>C</answer> because", 1, 0, "C", "text after"),
    ("<answer>C", 0, 0, "", "cut"),
    ("<answer>The reasoning goes here, so C</answer>", 0, 1, "", "reasoning smuggled into the answer"),
]

THINK_AFTER = [
    ("<answer>C</answer><think>x</think>", 1, 1, "C", "plain"),
    ("\n<answer>C.</answer>\r\n<think>\nx\n</think>\n", 1, 1, "C", "white space and period"),
    ("<think>x</think><answer>C</answer>", 1, 0, "C", "the order of think"),
    ("<answer>C</answer>", 1, 0, "C", "no reasoning"),
    ("<answer>C</answer><think></think>", 1, 0, "C", "empty reasoning"),
    ("<answer>C</answer><think>x", 1, 0, "C", "cut in the reasoning: the answer stood before it"),
    ("<answer>C</answer><think>but <answer>A</answer></think>", 0, 0, "", "a second thought"),
    ("<answer>A</answer><think>rather C</think>", 0, 1, "A", "the right letter only in the reasoning"),
    ("<think>x</think><answer>C</answer><think>y</think>", 1, 0, "C", "reasoning before as well"),
    ("<answer>C</answer>x<think>y</think>", 1, 0, "C", "text between"),
    ("<answer>C</answer><think>\u200b</think>", 1, 0, "C", "invisible reasoning"),
    ("<answer>C</answer><think>a < b</think>", 1, 1, "C", "an angle bracket in the reasoning"),
]

CASES = [
    pytest.param(style, *case, id=f"{style}: {case[-1]}")
    for style, table in (("think", THINK), ("no-think", NO_THINK), ("think-after", THINK_AFTER))
    for case in table
]


def test_the_table_is_as_long_as_promised_and_has_no_case_twice():
    assert len(CASES) >= 150
    assert len({(case.values[0], case.values[1]) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("style", "text", "acc", "well_formed", "pred", "why"), CASES)
def test_strict_verdict(style, text, acc, well_formed, pred, why):
    result = compute_score("omnimedvqa/ct", text, "C", {"options": OPTIONS, "style": style})
    expected = {"acc": acc, "format": well_formed, "pred": pred, "parsed": int(pred != "")}
    assert result == expected | {"score": float(acc + well_formed)}, why
    assert (why_malformed(text, style) == "") == bool(well_formed)


@pytest.mark.parametrize(
    ("options", "answer", "pred", "why"),
    [
        (["Yes", "No"], "C", "", "a question with two options has no C"),
        (["Yes", "No"], "b", "B", "but a B"),
        (
            ["Thyroid Gland", "Thyroid gland", "Liver"],
            "Thyroid gland",
            "B",
            "exact spelling decides between near twins",
        ),
        (["Thyroid Gland", "Thyroid gland", "Liver"], "thyroid gland", "", "without it, neither is meant"),
        (["Lung", "Lung", "Liver"], "Lung", "", "the same text twice names no option"),
        (["No.", "Yes"], "No", "A", "only the right option ends with a period in many rows"),
        (["No", "Yes"], "No.", "A", "and the other way round"),
        (["B", "A"], "A", "A", "a letter is a letter, even where an option's text is one"),
        (["vitamin C", "C"], "C", "B", "of two options, C is no letter; it is the second one's text"),
        (["a" * 200, "b"], "a" * 200, "A", "an option of 200 characters"),
        (["x (y), z", "w"], "x (y), z", "A", "comma and parentheses in the text"),
        (["CT", 7, None], "7", "", "an option that is no text is never matched by text"),
        (["CT", 7, None], "B", "B", "but by its letter"),
        ((), "A", "", "no options: no letter"),
        (None, "A", "A", "options not known: any letter"),
        (None, "CT", "", "options not known: no text"),
        (["\u212a"], "k", "A", "lower case by Unicode's rule makes the Kelvin sign a k; harmless, it is option text"),
    ],
)
def test_which_option_an_answer_names(options, answer, pred, why):
    assert parse(f"<answer>{answer}</answer>", "no-think", options).pred == pred, why


@pytest.mark.parametrize(
    ("text", "style", "why"),
    [
        ("", "think", "no <think>"),
        ("<think>x</think>", "think", "no <answer>"),
        ("<think>x</think><answer>C</answer><answer>C</answer>", "think", "2 times <answer>"),
        ("<think>x</think><answer>C</answer>", "no-think", "<think> has no place in the no-think style"),
        ("<answer>C</answer><think>x</think>", "think", "blocks out of order: <answer> </answer> <think> </think>"),
        ("<think>x</think> so <answer>C</answer>", "think", "text outside the blocks"),
        ("<think> </think><answer>C</answer>", "think", "empty <think>"),
        ("<think>x</think><answer> </answer>", "think", "empty <answer>"),
        ("<think>x</think><answer>C</answer>", "think", ""),
    ],
)
def test_the_reason_is_given_in_words(text, style, why):
    assert why_malformed(text, style) == why
