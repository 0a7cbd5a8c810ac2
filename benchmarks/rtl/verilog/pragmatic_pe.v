// Bit-Pragmatic PE (Albericio et al., MICRO 2017): every lane takes the essential bits of its serial
// operand one by one, shifts the parallel one by each, and an adder tree joins the lanes. All lanes
// wait for the one with the most essential bits.
//
// In the original activations are serial; here, where activations are resident, weights are, in sign
// and magnitude, with one stage of shifting. In offset form, as bitwave_pe.
module pragmatic_pe #(
    parameter LANES = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter EXPONENT = $clog2(WIDTH),
    parameter TERM = 2 + EXPONENT
) (
    input                        clock,
    input                        reset,
    input                        load,
    input      [LANES*WIDTH-1:0] activations_in,  // the column's bus
    input      [LANES*TERM-1:0]  step_in,         // of every lane {valid, sign, exponent}
    input                        last_in,
    output reg [LANES*TERM-1:0]  step,
    output reg                   last,
    input      [PSUM-1:0]        psum_in,
    output     [PSUM-1:0]        psum
);
    localparam SUM = 2 * WIDTH + $clog2(LANES) + 1;
    localparam OUT = 2 * WIDTH - 1;

    reg  [LANES*WIDTH-1:0] activations;
    wire [LANES*SUM-1:0] words;
    wire [SUM-1:0] sum, carry;
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            wire [TERM-1:0] term = step_in[i*TERM +: TERM];
            wire [WIDTH-1:0] x = (activations[i*WIDTH +: WIDTH] ^ {WIDTH{term[EXPONENT]}})
                                 & {WIDTH{term[TERM-1]}};
            wire [OUT-1:0] shifted = {{(OUT-WIDTH){1'b0}}, x} << term[EXPONENT-1:0];
            assign words[i*SUM +: SUM] = {{(SUM-OUT){1'b0}}, shifted};
        end
    endgenerate
    carry_save_tree #(.WORDS(LANES), .WIDTH(SUM)) tree (
        .words(words), .low({(LANES-2){1'b0}}), .sum(sum), .carry(carry)
    );
    late_sum #(.SUM(SUM), .PSUM(PSUM)) back (
        .clock(clock), .reset(reset), .a(sum), .b(carry), .carry_in(2'b00),
        .last_in(last_in), .psum_in(psum_in), .psum(psum)
    );
    always @(posedge clock) begin
        if (load) activations <= activations_in;
        step <= step_in;
        last <= last_in & ~reset;
    end
endmodule
