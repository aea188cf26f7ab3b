# The probe's guest, assembled into stub.bin (checked in, so that building
# Blixard needs no assembler):
#   as --32 stub.asm -o stub.o && ld -m elf_i386 -Ttext 0x100000 --oformat binary stub.o -o stub.bin
# A multiboot kernel that does what every 64-bit kernel does first: page tables,
# an MSR, long mode. It then writes 1 to the isa-debug-exit device, which ends
# QEMU with status 1<<1|1 = 3. A write of 0 (status 1) would mean that long mode
# was not entered.
.code32
.text
.globl _start
.align 4
hdr: .long 0x1BADB002, 0x00010000, -(0x1BADB002+0x00010000)
 .long hdr, hdr, 0, 0, _start
_start:
 cli
 movl $0x104000, %esp
 # zero page tables at 0x101000..0x103fff
 movl $0x101000,%edi
 xorl %eax,%eax
 movl $0xc00,%ecx
 cld
 rep stosl
 movl $0x102003,0x101000
 movl $0x103003,0x102000
 movl $0x000083,0x103000
 movl %cr4,%eax
 orl $0x20,%eax
 movl %eax,%cr4
 movl $0x101000,%eax
 movl %eax,%cr3
 movl $0xC0000080,%ecx
 rdmsr
 orl $0x100,%eax
 wrmsr
 movl %cr0,%eax
 orl $0x80000000,%eax
 movl %eax,%cr0
 rdmsr
 andl $0x400,%eax   # LMA
 shrl $10,%eax      # 1 -> exit status 3
 movw $0x501,%dx
 outb %al,%dx
1: hlt
 jmp 1b
