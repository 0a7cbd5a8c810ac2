// Stripes lane group (Judd et al., MICRO 2016): one bit of every serial operand a cycle, ANDed with
// the parallel ones, an adder tree over the lanes, and an accumulator that moves up a bit a cycle.
//
// In the original activations are serial. Here, where activations are resident, weights are: a bit
// column of LANES weights a cycle, two's complement, the sign column first, which subtracts.
// Activations are unsigned (signed ones plus 2^7; the weights alone say what that adds).
module stripes_pe #(
    parameter LANES = 8,
    parameter WIDTH = 8,
    parameter PSUM = 28
) (
    input                        clock,
    input                        reset,
    input                        load,
    input      [LANES*WIDTH-1:0] activations_in,  // the column's bus
    input      [LANES:0]         step_in,         // {sign column, a bit of every weight}
    input                        last_in,
    output reg [LANES:0]         step,
    output reg                   last,
    input      [PSUM-1:0]        psum_in,
    output     [PSUM-1:0]        psum
);
    localparam SUM = 2 * WIDTH + $clog2(LANES) + 1;
    localparam TREE = WIDTH + $clog2(LANES);

    reg  [LANES*WIDTH-1:0] activations;
    wire [LANES*TREE-1:0] words;
    wire [TREE-1:0] sum, carry, column;
    wire subtract = step_in[LANES];
    genvar i;
    generate
        for (i = 0; i < LANES; i = i + 1) begin : lane
            assign words[i*TREE +: TREE] = {{(TREE-WIDTH){1'b0}},
                activations[i*WIDTH +: WIDTH] & {WIDTH{step_in[i]}}};
        end
    endgenerate
    carry_save_tree #(.WORDS(LANES), .WIDTH(TREE)) tree (
        .words(words), .low({(LANES-2){1'b0}}), .sum(sum), .carry(carry)
    );
    ripple_adder #(.WIDTH(TREE)) adder (.a(sum), .b(carry), .sum(column));
    late_sum #(.SUM(SUM), .PSUM(PSUM), .UP(1)) back (
        .clock(clock), .reset(reset),
        .a({{(SUM-TREE){subtract}}, column ^ {TREE{subtract}}}), .b({SUM{1'b0}}),
        .carry_in({subtract, 1'b0}), .last_in(last_in), .psum_in(psum_in), .psum(psum)
    );
    always @(posedge clock) begin
        if (load) activations <= activations_in;
        step <= step_in;
        last <= last_in & ~reset;
    end
endmodule
