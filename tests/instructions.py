"""Which functions of a compiled module need a newer processor than they may: a wheel runs on every x86-64 one only if
the kernels that are picked at run time hold all that needs more, and the linker shares none of their code with others.

python instructions.py MODULE
"""

import re
import subprocess
import sys

# where kernels of an instruction set live, in mangled names
AVX512, AVX2 = "6avx512", "4avx2"
FUNCTION = re.compile(r"[0-9a-f]+ <(.*)>:$")
NEEDS_AVX512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
NEEDS_AVX = re.compile(r"\tv[a-z0-9]+\b|%ymm|\t(mulx|s[ah][lr]x|rorx|pdep|pext|bzhi|andn|bextr|bls(i|r|msk)|lzcnt)\b")
# SSE3 to SSE4.2. tzcnt is not among them: compilers write it where bsf, which older processors read, does as well
NEEDS_SSE3 = re.compile(
    r"\t(popcnt|crc32|movbe|adcx|adox|pshufb|ptest|lddqu|movddup|movs[hl]dup|addsubp[sd]|h(add|sub)p[sd]|dpp[sd]|round[sp][sd]"
    r"|insertps|extractps|p(min|max)([su]d|sb|uw)|pmul(ld|dq|hrsw)|pmaddubsw|p?blend\w+|pinsr[bdq]|pextr[bdq]|pmov[sz]x\w+"
    r"|packusdw|mpsadbw|phminposuw|pabs[bwd]|palignr|ph(add|sub)\w+|psign[bwd]|pcmp(eq|gt)q|pcmp[ei]str\w|movntdqa)\b"
)


def misplaced(module):
    """(function, instruction) of every function that needs more than its name allows, its first such instruction."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-w", module]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found, function, forbidden = {}, "", ()
    for line in lines:
        if header := FUNCTION.match(line):
            function = header[1]
            forbidden = (NEEDS_AVX512, NEEDS_AVX, NEEDS_SSE3)
            if AVX512 in function:
                forbidden = ()
            elif AVX2 in function:
                forbidden = (NEEDS_AVX512,)
        elif function not in found and any(each.search(line) for each in forbidden):
            found[function] = line.split("\t", 1)[1]
    return list(found.items())


if __name__ == "__main__":
    wrong = misplaced(sys.argv[1])
    print("\n".join(f"{function}: {instruction}" for function, instruction in wrong) or "none")
    sys.exit(bool(wrong))
