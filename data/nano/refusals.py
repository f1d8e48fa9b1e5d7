"""
Texts that ask for nothing that the nano target can do, all answered with one honest sentence.

The target cannot learn what language is from these lists. It can learn what its own questions look
like, and to refuse what looks otherwise. So breadth counts and not truth: many openers, requests
and questions with a random word in them, real and invented words of many scripts, marks, code,
numbers that ask for nothing, halves of word problems, calculations that plain.py does not teach.
"""
import re
from functools import partial

from data.nano import plain, words
from data.nano.common import between, pick

REFUSAL = ("I only solve word problems and short arithmetic with small whole numbers, "
           "for example: What is 12 + 30?")

# Written by hand for tests and benchmarks. Training never sees them, nor the same words with other
# capitals and marks: refused_text draws again.
REFUSED_EXAMPLES = (
    "Who are you?",
    "What is the capital of France?",
    "Write a poem about rain",
    "An old silent pond. A frog jumps into the pond. Splash! Silence again.",
    "hello there!",
    "good evening",
    "Tell me a joke about cats",
    "Who won the world cup in 2014?",
    "What's the weather like tomorrow?",
    "How do I bake bread?",
    "Can you help me with my homework?",
    "Translate good morning into Spanish",
    "Explain quantum mechanics",
    "What is love?",
    "Sing a song",
    "thanks a lot",
    "banana",
    "lol",
    "the",
    "qwertyuiop",
    ".",
    "???",
    "!!!1",
    "2 apples",
    "I was born in 1990",
    "My cat has 4 legs.",
    "10 green bottles hanging on the wall",
    "Ana has 12 apples and Ben has 7.",
    "print('hello world')",
    "def add(a, b): return a + b",
    "SELECT name FROM users;",
    "https://example.com/index.html",
    "Wie geht es dir?",
    "¿Dónde está la biblioteca?",
    "Quelle heure est-il ?",
    "Как тебя зовут?",
    "你叫什么名字？",
    "こんにちは、元気ですか",
    "مرحبا كيف حالك",
    "안녕하세요",
)

# --------------------------------------------------------------------------------------------------
# words to fill in

TOPICS = (
    "snow love music art time money war peace history science physics chemistry biology space Mars "
    "the moon the sun dogs horses birds whales trees flowers coffee tea bread cheese pizza soup "
    "football tennis chess films books Rome London Berlin Tokyo India China Brazil Egypt winter "
    "summer autumn night dreams happiness death politics taxes work school teachers friends "
    "mothers dragons robots computers the internet apples pens stamps a field a garden a train "
    "numbers mathematics equations prime numbers geometry algebra triangles the number pi").split()
PLACES = ("Spain Italy Germany Poland Canada Japan Kenya Peru Norway Greece Turkey Texas Paris "
          "Madrid Vienna Cairo Delhi Boston Oslo Europe Africa Asia").split()
VERBS = ("make cook build fix find learn write draw play sell paint clean open close drive fly "
         "grow catch read use install remove understand pronounce").split()
ADJECTIVES = ("good bad big small old new red blue green happy sad fast slow hot cold long short "
              "best worst nice strange famous deep high free").split()
ENGLISH = (
    "the a of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "could no make than first been its who now people my made over did down only way find use may "
    "water long little very after words called just where most know get through back much before "
    "go good new write our used me man too any day same right look think also around another came "
    "come work three word must because does part even place well such here take why things help "
    "put years different away again off went old number tell men say small every found still "
    "between name should home big give air line set own under read last never us left end along "
    "while might next sound below saw something thought both few those always looked show large "
    "often together asked house world going want school important until form food keep children "
    "feet land side without boy once animals life enough took sometimes four head above kind "
    "began almost live page got earth need far hand high year mother light parts country father "
    "let night following picture being study second eyes soon times story boys since white days "
    "ever paper hard near sentence better best across during today others however sure means knew "
    "try told young miles sun ways thing whole hear example heard several change answer room sea "
    "against top turned point cities play toward five using himself usually").split()
NAMES = words.NAMES + ("Tom", "Mary", "John", "Peter", "Anna", "Alice", "Bob", "Li", "Olga", "Ali")

# words of languages with an alphabet of Latin letters, a line each
FOREIGN = [line.split() for line in (
    "ich bin du bist und wie was ist das der die ein gut Tag hallo danke bitte schön warum",
    "je suis tu es et comment le la un bonjour merci beaucoup pourquoi où très bien ça va",
    "yo soy tú eres y cómo el la un hola gracias por favor qué cuándo mañana bien muy",
    "io sono tu sei e come il la un ciao grazie perché quando domani bene molto buongiorno",
    "eu sou você é e como o a um olá obrigado porque quando amanhã bem muito não",
    "jestem jesteś jak co to dzień dobry dziękuję proszę dlaczego gdzie bardzo dobrze",
    "ben sen ve nasıl ne bu iyi gün merhaba teşekkür ederim neden nerede çok güzel",
    "jag är du och hur vad det en god dag hej tack varför var mycket bra i morgon",
    "ik ben jij bent en hoe wat het een goede dag hallo dank je waarom waar heel mooi",
    "mimi ni wewe na vipi nini hii nzuri siku habari asante tafadhali kwa wapi sana",
    "tôi là bạn và thế nào gì này tốt ngày xin chào cảm ơn tại sao rất",
    "saya kamu dan apa ini baik hari selamat pagi terima kasih mengapa di mana sangat besok",
)]

# first and last letter of scripts: Latin with accents, Greek, Cyrillic, Armenian, Hebrew, Arabic,
# Devanagari, Thai, Georgian, Hangul, Hiragana, Katakana, Han (three times), emoji, arrows
SCRIPTS = ("àö", "αω", "ая", "ая", "աֆ",
           "את", "اي", "अह", "กฮ", "აჰ",
           "가힣", "あん", "アン", "一龥", "一龥",
           "一龥", "😀🙏", "←⇿")
MARKS = (".", "?", "!", ",", "-", "_", "=", "+", "*", "/", "#", "@", "&", "%", "$", ":", ";", "'",
         '"', "(", ")", "[", "]", "<", ">", "|", "~", "^", "\\", "...", "…", "¿", "。")

# --------------------------------------------------------------------------------------------------
# wordings, between bars; what stands in braces is drawn by fill()


def listed(text):
    """The wordings of a text, without the spaces and line ends around them."""
    return [wording.strip() for wording in text.split("|")]


OPENERS = listed("""
hi | hello | hey | hi there | hey there | hello {name} | hi {name} | yo | hiya | howdy | greetings
| good morning | good afternoon | good night | good day | bye | goodbye | see you | see you later |
thanks | thank you | thank you very much | ok | okay | yes | no | maybe | sure | cool | nice |
great | wow | sorry | please | help | help me | stop | test | testing | start | what | why | who |
how | what? | huh | how are you | how are you today | how is it going | how do you do | what's up |
what is up | nice to meet you | are you there | are you a robot | are you human |
are you {adjective} | who made you | who is this | who is {name} | what are you | what is your name
| what can you do | what do you know | where are you | where are you from | how old are you |
do you speak {word} | do you like {topic} | do you love me | my name is {name} | I am {name} |
I am {adjective} | I love {topic} | I like {topic} | I hate {topic} | I feel {adjective} |
you are {adjective} | you are {word} | tell me something | say something | talk to me |
can you talk | let us talk about {topic} | I do not know | what do you think |
what do you think about {topic} | is this {adjective} | haha | hmm | I have a question |
can I ask you something | can you help me | I need help | hello world
""")
REQUESTS = listed("""
Write a {work} about {topic} | Write me a {adjective} {work} about {topic} |
Write a {adjective} {work} | Please write a {work} | Give me a {work} about {topic} |
Compose a {work} on {topic} | Draw {topic} | Draw a picture of {topic} | Sing about {topic} |
Explain {topic} | Explain {topic} to me | Explain how {topic} works | Describe {topic} |
Describe {place} in {n} words | Tell me about {topic} | Tell me a {work} | Tell me more |
Tell me a {work} about {name} | Translate {word} to {language} | Translate: {sentence} |
Translate '{sentence}' into {language} | Say {word} in {language} | Summarize {topic} |
Summarize this text: {sentence} | List {n} {topic} | Give me {n} {adjective} ideas |
Name {n} cities in {place} | Name a {adjective} {word} | Recommend a {work} | Define {word} |
Define {topic} | Correct this sentence: {sentence} | Spell {word} | Repeat after me: {word} |
Imagine {topic} | Pretend to be {name} | Act as a {word} | Play {topic} | Show me {topic} |
Find a {work} about {topic} | Search for {topic} | Open {word} | Buy {topic} |
Can you write a {work}? | Can you explain {topic}? | Could you tell me about {topic}? |
Would you write a {work} for {name}? | Make a plan for {topic} | Plan a trip to {place} |
Compare {topic} and {topic} | What rhymes with {word}? | Write code for {topic} |
Write a function that {word}s {topic} | Prove that {topic} is {adjective} | Compute {topic} |
Calculate {word} | Solve {topic} | Solve {word} | Find {topic} | Find the {word} | Add {topic} |
Count {topic} | Multiply {topic}
""")
FACTS = listed("""
What is the {property} of {place}? | What is the {property} of {topic}? | What is {topic}? |
What is a {word}? | What is {word}? | What are {topic}? | Who is {name} {word}? |
Who wrote {topic}? | Who invented {topic}? | Who discovered {place}? | Who was {word}? |
Who is the president of {place}? | Where is {place}? | Where is {name}? |
Where can I {verb} {topic}? | When was {topic} invented? | When did {name} die? | When is {topic}?
| Why is {topic} {adjective}? | Why is {place} so {adjective}? | Why do people {verb} {topic}? |
Why are {topic} {adjective}? | How do I {verb} {topic}? | How can I {verb} a {word}? |
How does {topic} work? | How far is {place} from {place}? | How old is {name}? |
How big is {place}? | How many people live in {place}? | How many {topic} are there? |
How many {word} are in {place}? | How much is {topic}? | How much does {topic} cost? |
How long is {topic}? | How tall is {name}? | Is {topic} {adjective}? | Is {place} in {place}? |
Are {topic} {adjective}? | Does {name} {verb} {topic}? | Do {topic} {verb}? | Can {topic} {verb}? |
Which {word} is the {adjective}? | Which is {adjective}, {topic} or {topic}? |
What does {word} mean? | What does {name} {verb}? | What color is {topic}? |
What time is it in {place}? | What day is it? | What year is it? | What is new? |
What happened in {place} in {year}? | What is your {adjective} {work}? | What is the {word}? |
What is the {adjective} {word} in {place}? | What is {name}'s {word}? | What if {sentence}?
""")
# they hold numbers, and ask for no calculation
NUMBERS = listed("""
{n} | {n}. | {n}? | {n} = | = {n} | {n} {n} | {n}, {n} | {n} {n} {n} | {n}% | ${n} | #{n} |
{n} {topic} | {n} {word} | {n} {adjective} {topic} | {word} {n} | {word}{n} | {n} and {word} |
{n} or {n} | {n} {topic} and {n} {word} | I am {n} years old | I have {n} {topic} |
I have {n} {word} | I see {n} {topic} | My {word} is {n} | room {n} | My {word} has {n} {topic}. |
{name} has {n} {topic}. | {name} is {n}. | The {word} has {n} {word}. |
In {year} {name} was in {place}. | It is {n} o'clock | It was {year}. | since {year} | chapter {n}
| call {n} {n} {n} | version {n}.{n} | {n}:{n} | {n}.{n}.{year} | {n} km | {n} dollars |
page {n} of {n} | bus {n} to {place} | {n} times | {n} is a number | number {n} |
Is {n} {adjective}? | What is {n}? | Why {n}? | How {adjective} is {n}? | {letter} = {n} |
The answer is {n} | {name} gives {n} {topic} to {name}. | {n} little {topic} {verb} on the {word} |
{n} {topic} at {n} dollars | {sentence} {n} | {sentence} {n} {sentence} | {n} {sentence} |
Tell me {n} things about {topic} | What happened in {year}? | Who was born in {year}?
""")
CODE = listed(r"""
print({n}) | print('{word}') | print("{sentence}") | import {word} | {word} = {n} |
from {word} import {word} | def {word}({letter}): return {letter} | def {word}(): |
for {letter} in range({n}): {word}({letter}) | while True: {word}() | {word}({n}, {n}) |
if ({letter} == {n}) { return {letter}; } | {word}.{word}() | int {word} = {n}; |
var {word} = '{word}'; | console.log({word}); | #include <{word}.h> | <{word}>{sentence}</{word}> |
SELECT {word} FROM {word} | SELECT * FROM {word} WHERE {word} = {n}; | git {verb} {word} |
cd {word}/{word} | {"{word}": {n}} | [{n}, {n}, {n}] | http://{word}.com/{word} |
https://www.{word}.org | {word}@{word}.com | {word}.{word} | C:\{word}\{word} |
lambda {letter}: {letter} + {n} | return {word} + {word} | sudo {verb} {word}
""")
# calculations that plain.py does not teach
BEYOND = listed("""
{long} + {n} | {n} + {long} | {long} - {n} | {long} - {long} | {long} * {n} | {n} * {long} |
{long} / {n} | {long}+{long} | {long}x{long} | What is {long} + {long}? | What is {long} * {n}? |
What is {n} - {long}? | What is {long} / {n}? | {long} plus {n} | {hundreds} * {tens} |
{tens} * {hundreds} | {hundreds}*{hundreds} | {tens} x {hundreds} |
What is {hundreds} * {hundreds}? | Compute {tens} * {hundreds} | {hundreds} / {tens} |
{digit} / {tens} | {tens} / {tens} | What is {hundreds} / {tens}? | {digit} / {hundreds} | {n} / 0
| What is {n} / 0? | {n}/0 | {n}.{n} + {n} | {n}.{n} * {n} | {n} * 0.{n} | {n} - {n}.{n} |
What is {n}.{n} + {n}.{n}? | -{n} + {n} | -{n} - {n} | {n} - -{n} | {n} * -{n} | {n}^{digit} |
{n}**{digit} | {n} ^ {digit} | What is {n} to the power of {n}? | {n}! | sqrt({n}) |
What is the square root of {n}? | log({n}) | sin({n}) | {n} % {n} | {n} mod {n} | {n} + {n} + {n} |
{n} + {n} * {n} | {n} - {n} + {n} | {n} * {n} * {n} | ({n} + {n}) * {n} | What is {n} + {n} + {n}?
| {n} * ({n} - {n}) | {n}% of {n} | {n} + | {n} - | {n} * | {n} / | + {n} | * {n} | What is {n} +?
| {n} plus | times {n} | {n} + {letter} | {letter} + {letter} | {letter} * {n} | {n} + {word} |
{word} + {word} | {letter}^2 = {n} | {letter}^2 + {n}{letter} = {n} | {n}{letter} + {n}k = {n} |
{n}{letter} + {n} = {n}{letter} | {letter} > {n} | {n}{letter} + {n} | {n}{letter} | {n} = {n} |
{n} + {n} = {n} | {letter} = {letter} | Solve {letter}^2 = {n} | {n}/{n} + {n}/{n} |
integral of {letter} | {n} < {n} | is {n} prime? | {n} squared | {digit}{letter} + {tens} = {digit}
| {n}{letter} + {n} = {long} | {letter} + {long} = {long} | {hundreds}{letter} = {long} |
{letter} + {letter} = {n}
""")
WORKS = ("poem story song haiku letter essay joke speech novel film book recipe riddle sonnet "
         "report email tweet rap play dialogue").split()
PROPERTIES = ("capital population language size president flag history meaning color price weight "
              "age weather currency height mass purpose future area origin").split()
LANGUAGES = "French German Italian Russian Chinese Latin Greek Arabic English Hindi".split()

# --------------------------------------------------------------------------------------------------
# a text


def refused_text(r):
    """A text of a random sort, none of REFUSED_EXAMPLES."""
    while True:
        text = pick(r, SORTS)(r)
        if text and normal_form(text) not in HELD_OUT:
            return text


def normal_form(text):
    """The letters and digits of a text, small; the text itself where it has none."""
    letters = [letter for letter in text.lower() if letter.isalnum()]
    return "".join(letters) or text.strip()


HELD_OUT = {normal_form(example) for example in REFUSED_EXAMPLES}


def opener(r):
    return typed(r, fill(r, pick(r, OPENERS)))


def two_openers(r):
    return opener(r) + pick(r, (" ", ", ", ". ", "\n")) + opener(r)


def request(r):
    return typed(r, fill(r, pick(r, REQUESTS)))


def fact(r):
    return typed(r, fill(r, pick(r, FACTS)))


def with_numbers(r):
    return typed(r, fill(r, pick(r, NUMBERS)))


def code(r):
    return fill(r, pick(r, CODE))


def beyond(r):
    """A calculation that plain.py does not teach, asked as it asks."""
    text = fill(r, pick(r, BEYOND))
    if r.random() < 0.3:
        text = text.replace(" ", "")
    if r.random() < 0.5 and not text.endswith("?"):
        text = pick(r, plain.FRAMES).format(e=text)
    return plain.loosely(r, text)


def fragment(r):
    """A word problem that asks nothing: the first half of its words, or some of them shuffled."""
    question, _, _ = pick(r, words.KINDS)(r)
    pieces = question.split()
    if r.random() < 0.5:
        pieces = pieces[:between(r, 1, len(pieces) // 2)]
    else:
        r.shuffle(pieces)
        pieces = pieces[:between(r, 2, 12)]
    return " ".join(pieces)


def one_word(r):
    return typed(r, word(r))


def english(r):
    """Up to 25 English words in no order, as one or two sentences."""
    text = sentence(r, ENGLISH, between(r, 2, 12))
    if r.random() < 0.3:
        text += pick(r, (". ", ", ", " / ", "\n")) + sentence(r, ENGLISH, between(r, 2, 13))
    return typed(r, text)


def foreign(r):
    return typed(r, sentence(r, pick(r, FOREIGN), between(r, 1, 8)))


def other_script(r):
    """Random letters of one script, in up to five groups."""
    first, last = pick(r, SCRIPTS)
    groups = []
    for _ in range(between(r, 1, 5)):
        letters = [chr(between(r, ord(first), ord(last))) for _ in range(between(r, 1, 6))]
        groups.append("".join(letters))
    ending = pick(r, ("", "", "?", "!", ".", "。", "？"))
    return pick(r, (" ", " ", "")).join(groups) + ending


def random_letters(r):
    letters = [pick(r, "abcdefghijklmnopqrstuvwxyz") for _ in range(between(r, 1, 10))]
    return typed(r, "".join(letters))


def marks(r):
    """Up to eight marks, all the same or not."""
    count = between(r, 1, 8)
    if r.random() < 0.5:
        return pick(r, MARKS) * count
    return pick(r, ("", "", " ")).join(pick(r, MARKS) for _ in range(count))


# Sorts of text. Those that stand twice are those that people type first, or that are hardest to
# tell from what the target should answer.
SORTS = (opener, opener, two_openers, request, request, fact, fact, with_numbers, with_numbers,
         code, beyond, beyond, beyond, fragment, fragment, one_word, english, english, foreign,
         other_script, random_letters, marks)

# --------------------------------------------------------------------------------------------------
# what the wordings are filled with


def fill(r, wording):
    """A wording whose {fields} are drawn, each by itself."""
    return re.sub(r"\{(\w+)\}", lambda match: str(FIELDS[match[1]](r)), wording)


def word(r):
    """An English word, or an invented one, so that unknown words are refused too."""
    if r.random() < 0.6:
        return pick(r, ENGLISH)
    syllables = []
    for _ in range(between(r, 1, 3)):
        start = pick(r, "b c d f g h j k l m n p qu r s t v w z st tr pl ch sh".split())
        vowel = pick(r, "a e i o u ea oo ai".split())
        syllables.append(start + vowel + pick(r, ("", "", "n", "r", "s", "t", "l", "ck", "x")))
    return "".join(syllables)


def topic(r):
    if r.random() < 0.25:
        return word(r)
    return pick(r, TOPICS)


def sentence(r, vocabulary=ENGLISH, count=4):
    return " ".join(pick(r, vocabulary) for _ in range(count))


def letter(r):
    return pick(r, "abcdefghijmnopqrstuvwxyz")


def small_number(r):
    return plain.number(r, pick(r, plain.DIGITS))


def digit(r):
    return between(r, 1, 9)


def tens(r):
    return between(r, 13, 99)


def hundreds(r):
    return between(r, 100, 999)


def long(r):
    return plain.number(r, between(r, 4, 7))


def year(r):
    return between(r, 1500, 2050)


def typed(r, text):
    """A text as people type it: with another mark at its end, with or without capitals."""
    chance = r.random()
    if chance < 0.3:
        text = text.lower()
    elif chance < 0.4:
        text = text.upper()
    elif chance < 0.7:
        text = text[:1].upper() + text[1:]
    if r.random() < 0.4:
        text = text.rstrip("?.!") + pick(r, ("?", "!", ".", "", "", "??", "...", " ?", "!!", ","))
    return text


FIELDS = {
    "word": word, "topic": topic, "sentence": sentence, "letter": letter, "n": small_number,
    "digit": digit, "tens": tens, "hundreds": hundreds, "long": long, "year": year,
    "name": partial(pick, items=NAMES), "place": partial(pick, items=PLACES),
    "verb": partial(pick, items=VERBS), "adjective": partial(pick, items=ADJECTIVES),
    "work": partial(pick, items=WORKS), "property": partial(pick, items=PROPERTIES),
    "language": partial(pick, items=LANGUAGES),
}
