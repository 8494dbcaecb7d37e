// Everything of the probe guest that runs in ring 0. AT&T syntax, since it mixes 16-, 32- and 64-bit code.
//
//   PVH note (32-bit) --+
//   SIPI (16-bit) ------+--> enter_long --> long_common --> iretq --> probe_entry (ring 3, Rust)
//   ELF entry (64-bit) -------------------------^
//
// Kept short because a host without hardware virtualization emulates ring 0 an instruction at a time. From then on ring 0 is
// entered only by the timer and by exceptions, of which one, the `ud2` in `service_call`, asks for a service: such hosts deliver every
// exception of ring 3, but neither `int n` nor `syscall`.

.set CS32, 0x08
.set CS64, 0x10
.set USER_DS, 0x23          // selector 0x20, privilege 3
.set USER_CS, 0x2b          // selector 0x28, privilege 3
.set FIRST_TSS, 0x30

.set KIND_AP, 0
.set KIND_PVH, 1
.set KIND_LINUX, 2

.set MAX_CPUS, 16
.set CPU_AREA, 4096         // ring-0 stack, the processor's own counters at its bottom
.set USER_STACK, 65536        // a page on it is aligned to its own 4 KiB: the disk has several at once
.set TSS_STRIDE, 512
.set TSS_LIMIT, 104 + 256   // 256 bytes of I/O permission bitmap (ports below 0x800) and one closing byte

.set CR0_BITS, 0x80010033   // PG WP NE ET MP PE
.set CR4_BITS, 0x620        // OSXMMEXCPT OSFXSR PAE
.set EFER, 0xc0000080
.set EFER_LME, 0x100
.set LAPIC, 0xfee00000
.set LAPIC_EOI, 0xb0
.set LAPIC_SPURIOUS, 0xf0
.set TRAMPOLINE, 0x8000     // must agree with machine.rs

// Xen's PVH boot ABI: note type 18 (XEN_ELFNOTE_PHYS32_ENTRY) holds the 32-bit entry.
.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_entry

.section .boot, "awx", @progbits

.set SERIAL, 0x3f8
.set LINE_FEED, 0x0a

// The first instructions say an empty line: whoever starts the guest sees when it began.
.code32
.globl pvh_entry
pvh_entry:                  // ebx = hvm_start_info; flat segments, no paging
    cli
    cld
    movw $SERIAL, %dx
    movb $LINE_FEED, %al
    outb %al, %dx
    lgdtl gdtr
    movl %ebx, %esi
    movl $KIND_PVH, %edi
    jmp enter_long
ap_entry32:
    movl $KIND_AP, %edi
enter_long:
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl $CR0_BITS, %eax
    movl %eax, %cr0
    ljmpl $CS64, $long_common

.code64
.globl linux_entry
linux_entry:                // rsi = boot_params; long mode, identity-mapped
    cli
    cld
    movw $SERIAL, %dx
    movb $LINE_FEED, %al
    outb %al, %dx
    lgdt gdtr(%rip)
    movl $CR4_BITS, %eax
    movq %rax, %cr4
    movl $pml4, %eax
    movq %rax, %cr3
    movl $CR0_BITS, %eax
    movq %rax, %cr0
    movl $KIND_LINUX, %edi

long_common:                // edi = kind, esi = what the loader handed over
    cmpl $KIND_AP, %edi
    je 1f
    movl $tss, %edx         // an application processor's descriptor is filled by Rust
    movw %dx, gdt + FIRST_TSS + 2(%rip)
    shrl $16, %edx
    movb %dl, gdt + FIRST_TSS + 4(%rip)
    movb %dh, gdt + FIRST_TSS + 7(%rip)
    movb $0xff, %al         // mask the 8259s: the local APIC's timer is the only interrupt
    outb %al, $0x21
    outb %al, $0xa1
1:
    movl $1, %eax
    lock xaddl %eax, next_cpu(%rip)
    cmpl cpu_limit(%rip), %eax
    jae stop
    leal 1(%rax), %ecx
    movl %ecx, %esp
    shll $12, %esp
    addl $cpu_areas, %esp
    imull $USER_STACK, %ecx, %ecx
    addl $user_stacks - 8, %ecx // the ABI's alignment at a function's first instruction
    movl %eax, %edx
    shll $4, %edx
    addl $FIRST_TSS, %edx
    ltr %dx
    lidt idtr(%rip)
    movl $LAPIC, %edx
    movl $0x1ff, LAPIC_SPURIOUS(%rdx) // enabled, spurious vector 0xff
    movl %esi, %edx
    movl %edi, %esi
    movl %eax, %edi
    pushq $USER_DS
    pushq %rcx
    pushq $0x202            // interrupts on
    pushq $USER_CS
    pushq $probe_entry      // rdi = processor, rsi = kind, rdx = boot information
    iretq

.globl timer_entry
timer_entry:
    pushq %rax
    pushq %rcx
    pushq %rdx
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rsp, %rcx
    andq $-CPU_AREA, %rcx
    movq 8(%rcx), %rdx      // the tick before
    movq %rax, 8(%rcx)
    subq %rdx, %rax
    jb 3f
    cmpq 16(%rcx), %rax     // the largest gap
    jbe 2f
    movq %rax, 16(%rcx)
2:
    incq (%rcx)             // ticks
    movl $LAPIC, %eax
    movl $0, LAPIC_EOI(%rax)
    popq %rdx
    popq %rcx
    popq %rax
    iretq
3:
    incq 24(%rcx)           // the time-stamp counter went back
    jmp 2b

.globl disk_entry
disk_entry:                 // the disk's message: counted, no more
    pushq %rcx
    movq %rsp, %rcx
    andq $-CPU_AREA, %rcx
    incq 32(%rcx)
    movl $LAPIC, %ecx
    movl $0, LAPIC_EOI(%rcx)
    popq %rcx
    iretq

.globl net_entry
net_entry:                  // the NIC's, the same
    pushq %rcx
    movq %rsp, %rcx
    andq $-CPU_AREA, %rcx
    incq 40(%rcx)
    movl $LAPIC, %ecx
    movl $0, LAPIC_EOI(%rcx)
    popq %rcx
    iretq

.globl spurious_entry
spurious_entry:
    iretq

// 32 stubs of 16 bytes. Those without an error code push a zero.
.balign 16
.globl exception_stubs
exception_stubs:
.irp vector, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    .balign 16
    .if (\vector == 8) || (\vector == 10) || (\vector == 11) || (\vector == 12) || (\vector == 13) || (\vector == 14) || (\vector == 17) || (\vector == 21) || (\vector == 29) || (\vector == 30)
    .else
    pushq $0
    .endif
    pushq $\vector
    jmp exception_common
.endr

// Hands the exception to Rust in ring 3 on a fresh stack, with interrupts off and an empty interrupt table: a further exception is a
// triple fault, which is how the guest ends anyway.
exception_common:
    lidt no_idtr(%rip)
    popq %rdi               // vector
    popq %rsi               // error code
    movq (%rsp), %rdx       // rip
    movq %cr2, %rcx
    movq 8(%rsp), %r8       // cs
    movq 24(%rsp), %r9      // rsp
    movq %rsp, %rax
    andq $-CPU_AREA, %rax
    subq $cpu_areas, %rax
    shlq $4, %rax           // USER_STACK / CPU_AREA
    addq $user_stacks + USER_STACK - 8, %rax
    pushq $USER_DS
    pushq %rax
    pushq $0x2
    pushq $USER_CS
    pushq $probe_exception
    iretq

// Called from ring 3: eax = service, rdi and rsi its arguments, rax its answer.
.globl service_call
service_call:
    ud2
    ret

// An invalid opcode: a service if it is the one above.
.globl invalid_opcode_entry
invalid_opcode_entry:
    cmpq $service_call, (%rsp)
    jne exception_stubs + 6 * 16
    addq $2, (%rsp)
    cmpl $SERVICES, %eax
    jae stop
    jmpq *services(, %rax, 8)
service_idle:               // until the next interrupt
    sti
    hlt
    iretq
service_wrmsr:              // edi = register, rsi = value
    movl %edi, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq
service_lapic_read:         // edi = offset
    movl $LAPIC, %eax
    addl %edi, %eax
    movl (%rax), %eax
    iretq
service_lapic_write:        // edi = offset, esi = value
    movl $LAPIC, %eax
    addl %edi, %eax
    movl %esi, (%rax)
    iretq
service_cpuid:              // edi = leaf, rsi = where eax, ebx, ecx, edx go
    pushq %rbx
    movl %edi, %eax
    xorl %ecx, %ecx
    cpuid
    movl %eax, (%rsi)
    movl %ebx, 4(%rsi)
    movl %ecx, 8(%rsi)
    movl %edx, 12(%rsi)
    popq %rbx
    iretq
service_no_idt:             // the next exception is a triple fault
    lidt no_idtr(%rip)
    iretq
service_emulation:          // a 16-byte exchange with the APIC's page: KVM has to emulate it and cannot, on every kind of host
    movl $LAPIC, %esi
    lock cmpxchg16b (%rsi)
    iretq
service_config_read:        // edi = PCI bus, device, function and register, as port 0xcf8 takes them
    movl $0xcf8, %edx
    movl %edi, %eax
    outl %eax, %dx
    movl $0xcfc, %edx
    inl %dx, %eax
    iretq
service_config_write:       // edi = as above, esi = value
    movl $0xcf8, %edx
    movl %edi, %eax
    outl %eax, %dx
    movl $0xcfc, %edx
    movl %esi, %eax
    outl %eax, %dx
    iretq
stop:
    cli
    hlt
    jmp stop

.balign 8
services:
    .quad service_idle, service_wrmsr, service_lapic_read, service_lapic_write, service_cpuid, service_no_idt, service_emulation, stop
    .quad service_config_read, service_config_write
.set SERVICES, 10

// The first instructions of an application processor, copied to TRAMPOLINE.
.globl trampoline_start
.globl trampoline_end
.code16
trampoline_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl TRAMPOLINE + (trampoline_gdtr - trampoline_start)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $CS32, $ap_entry32
trampoline_gdtr:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
.code64

.balign 8
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
idtr:
    .word 256 * 16 - 1
    .quad idt
.balign 8
no_idtr:
    .word 0
    .quad 0

.globl next_cpu
.globl cpu_limit
.balign 4
next_cpu:
    .long 0
cpu_limit:                  // raised by Rust before it wakes the others
    .long 1

.section .tables, "aw", @progbits
// The first 4 GiB, in pages of 2 MiB, open to ring 3, accessed and dirty already. Built here so that no instruction has to.
.globl pdpt
.balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad directories + 7, directories + 0x1007, directories + 0x2007, directories + 0x3007
    .fill 508, 8, 0
directories:
    .set frame, 0
    .rept 2048
    .if frame == 0x7f7      // the local APIC's: uncached
    .quad (frame << 21) + 0xff
    .else
    .quad (frame << 21) + 0xe7
    .endif
    .set frame, frame + 1
    .endr

.globl gdt
.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff // 0x08 ring 0, 32-bit code
    .quad 0x00af9b000000ffff // 0x10 ring 0, 64-bit code
    .quad 0x00cf93000000ffff // 0x18 ring 0, data
    .quad 0x00cff3000000ffff // 0x20 ring 3, data
    .quad 0x00affb000000ffff // 0x28 ring 3, 64-bit code
    .quad 0x0000890000000000 + TSS_LIMIT, 0
    .fill (MAX_CPUS - 1) * 2, 8, 0
gdt_end:

.globl tss
.balign 512
tss:                        // processor 0's; Rust fills the others
    .long 0
    .quad cpu_areas + CPU_AREA
    .fill 102 - 12, 1, 0
    .word 104
    .fill 256, 1, 0
    .byte 0xff
    .balign 512
    .fill (MAX_CPUS - 1) * TSS_STRIDE, 1, 0

.section .bss
.globl idt
.globl cpu_areas
.balign 4096
idt:
    .skip 256 * 16
cpu_areas:
    .skip MAX_CPUS * CPU_AREA
user_stacks:
    .skip MAX_CPUS * USER_STACK

// What the compiler may call for.
.section .text.memory, "ax", @progbits
.globl memcpy
.globl memmove
.globl memset
.globl memcmp
.globl bcmp
memmove:
    cmpq %rsi, %rdi
    jbe memcpy
    leaq (%rsi, %rdx), %rax
    cmpq %rax, %rdi
    jae memcpy
    leaq -1(%rdi, %rdx), %rcx
    movq %rdi, %rax
    leaq -1(%rsi, %rdx), %rsi
    movq %rcx, %rdi
    movq %rdx, %rcx
    std
    rep movsb
    cld
    ret
memcpy:
    movq %rdi, %rax
    movq %rdx, %rcx
    rep movsb
    ret
memset:
    movq %rdi, %r8
    movl %esi, %eax
    movq %rdx, %rcx
    rep stosb
    movq %r8, %rax
    ret
memcmp:
bcmp:
    xorl %eax, %eax
    xorl %ecx, %ecx
4:
    cmpq %rdx, %rcx
    je 5f
    movzbl (%rdi, %rcx), %eax
    movzbl (%rsi, %rcx), %r8d
    incq %rcx
    subl %r8d, %eax
    je 4b
5:
    ret

// The precompiled `core` names these; nothing unwinds here.
.globl rust_eh_personality
.globl _Unwind_Resume
rust_eh_personality:
_Unwind_Resume:
    ud2
